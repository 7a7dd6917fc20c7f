"""LoRA experts, more of them in higher layers."""

from __future__ import annotations

from typing import final

from mixtura.methods._precision import exact_logits
from mixtura.methods.adapters._shared import LoraExperts, lora_gate, top_shares
from mixtura.types import Change, RouterInput, Site

METHOD = {
    "paper": None,
    "title": "Higher Layers Need More LoRA Experts",
    "tags": ["changes:linear"],
}


@final
class Mola(LoraExperts):
    """Fine-tune LoRA experts beside each linear layer, more in higher layers, of which a token gets the best.

    The layers are cut into stretches of equal length, from the first to the last, each with a number of
    experts of its own. It cannot be merged, because tokens decide.

    Args:
        rank: of each LoRA expert.
        alpha: what they learn is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        experts_by_depth: LoRA experts of each stretch of layers, from the first; None for 2, 4, 6, 8.
        top_k: experts that a token gets, by their softmax over its sum.
        balance: coefficient of the loss that keeps them in use, as Switch has it.
        seed: of what ``a`` and the router start as.

    Shapes:
        Parameters ``a [M, R, cols]``, ``b [M, rows, R]`` and ``gate [M, cols]``.

    Raises:
        SettingError: ``rank`` is not in [1, the smaller side of the matrix], or another is out of range.

    Example:
        >>> import torch
        >>> from mixtura.types import MatrixShape
        >>> shapes = {"weight": MatrixShape(6, 4)}
        >>> site = Site(name="q_proj", kind="linear", layer=3, num_layers=4, matrices=shapes)
        >>> made = Mola(site, rank=2).change(RouterInput.of(torch.eye(4)))
        >>> made.shares.shape, (made.shares > 0).sum(-1).tolist()
        (torch.Size([4, 8]), [2, 2, 2, 2])

    Differences from the paper:
        The balance is off, as in its code for a task; with it, its code has 0.001 and counts all matrices of
        a decoder layer together. Dropout is off, where its code has 0.05. Where the layers do not divide by
        the stretches the earlier ones are the longer. A layer with fewer experts than ``top_k`` gives all of
        them.

    Reference:
        Higher Layers Need More LoRA Experts (MoLA; no paper of the list); its code, GCYZSL/MoLA,
        ``src/mola_lora_hacked.py`` and ``mola_training.py``.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        experts_by_depth: list[int] | None = None,
        top_k: int = 2,
        balance: float = 0.0,
        seed: int = 0,
    ) -> None:
        stretches = experts_by_depth or [2, 4, 6, 8]
        place = min(site.layer * len(stretches) // max(site.num_layers, 1), len(stretches) - 1)
        super().__init__(
            site,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            num_experts=stretches[place],
            balance=balance,
            seed=seed,
            named="experts_by_depth",
        )
        self.experts_by_depth = experts_by_depth
        self.top_k = self.within("top_k", top_k, 1, 1024)
        self.gate = lora_gate(self)

    def change(self, inputs: RouterInput) -> Change:
        scores = exact_logits(inputs.x, self.gate).softmax(-1)
        shares = top_shares(scores, self.top_k)
        return self.mixed(shares, self.balanced(inputs, scores, shares))
