"""LoRA experts with top-k routing."""

from __future__ import annotations

from typing import final

from mixtura.methods._precision import exact_logits
from mixtura.methods.adapters._shared import LoraExperts, lora_gate, top_shares
from mixtura.types import Change, RouterInput, Site

METHOD = {
    "paper": 77,
    "title": "Mixture of Low-Rank Adapter Experts in Generalizable Audio Deepfake Detection",
    "tags": ["changes:linear"],
}


@final
class MoeLora(LoraExperts):
    """Fine-tune LoRA experts beside each linear layer, of which a router gives each token the best few.

    Experts take on what differs, such as ways a recording was made or faked, beside one frozen encoder. It
    cannot be merged, because tokens decide.

    Args:
        rank: of each LoRA expert.
        alpha: what they learn is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        num_experts: M, LoRA experts of each layer.
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
        >>> site = Site(name="q_proj", kind="linear", layer=0, num_layers=4, matrices=shapes)
        >>> made = MoeLora(site, rank=2).change(RouterInput.of(torch.eye(4)))
        >>> made.shares.shape, (made.shares > 0).sum(-1).tolist()
        (torch.Size([4, 4]), [2, 2, 2, 2])

    Differences from the paper:
        Written from the abstract, which names neither numbers nor the loss. There it is in the attention of a
        speech encoder; here in any linear layer, so name those of attention by ``target_modules``.

    Reference:
        Mixture of Low-Rank Adapter Experts in Generalizable Audio Deepfake Detection (paper 77, abstract).
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        num_experts: int = 4,
        top_k: int = 2,
        balance: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(
            site,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            num_experts=num_experts,
            balance=balance,
            seed=seed,
        )
        self.top_k = self.within("top_k", top_k, 1, num_experts)
        self.gate = lora_gate(self)

    def change(self, inputs: RouterInput) -> Change:
        scores = exact_logits(inputs.x, self.gate).softmax(-1)
        shares = top_shares(scores, self.top_k)
        return self.mixed(shares, self.balanced(inputs, scores, shares))
