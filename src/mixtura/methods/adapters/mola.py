"""LoRA experts, more of them in higher layers."""

from __future__ import annotations

from typing import final

from mixtura.methods._precision import exact_logits
from mixtura.methods.adapters import Adapter
from mixtura.methods.adapters._shared import (
    balance_loss,
    lora_gate,
    mixed,
    smallest_side,
    thin_pair,
    top_shares,
)
from mixtura.types import Change, RouterInput, Site

METHOD = {
    "paper": None,
    "title": "Higher Layers Need More LoRA Experts",
    "tags": ["changes:linear"],
}


@final
class Mola(Adapter):
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
        The balance is off, as in its template. Where the layers do not divide by the stretches the earlier
        ones are the longer. A layer with fewer experts than ``top_k`` gives all of them.

    Reference:
        MoLA (no paper of the list); template of TUDB-Labs/MoE-PEFT at 40f8cb7, which has one number for all
        layers.
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
        super().__init__(site)
        self.rank = self.within("rank", rank, 1, smallest_side(site.matrices))
        self.alpha = self.within("alpha", alpha, 0, 1e6)
        self.dropout = self.within("dropout", dropout, 0, 0.99)
        self.experts_by_depth, self.seed = experts_by_depth, seed
        self.top_k = self.within("top_k", top_k, 1, 1024)
        self.balance = self.within("balance", balance, 0, 1e6)
        stretches = experts_by_depth or [2, 4, 6, 8]
        place = min(site.layer * len(stretches) // max(site.num_layers, 1), len(stretches) - 1)
        self.num_experts = self.within("experts_by_depth", stretches[place], 1, 1024)
        self.a, self.b = thin_pair(site, "weight", [rank] * self.num_experts, seed)
        self.gate = lora_gate(site, self.num_experts, seed)

    def change(self, inputs: RouterInput) -> Change:
        scores = exact_logits(inputs.x, self.gate).softmax(-1)
        shares = top_shares(scores, self.top_k)
        losses = {}
        if self.balance and inputs.training:
            losses["balance"] = self.balance * balance_loss(scores, shares, inputs.valid)
        return mixed((self.a, self.b), self.alpha, shares, losses)
