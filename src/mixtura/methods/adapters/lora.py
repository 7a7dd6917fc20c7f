"""LoRA on linear layers."""

from __future__ import annotations

from typing import final

from mixtura.methods.adapters import Adapter
from mixtura.methods.adapters._shared import low_rank, smallest_side, thin_pair
from mixtura.types import Change, RouterInput, Site

METHOD = {
    "paper": None,
    "title": "LoRA: Low-Rank Adaptation of Large Language Models",
    "tags": ["changes:linear", "mergeable", "expands_to_lora"],
}


@final
class Lora(Adapter):
    """Fine-tune by two thin matrices beside each linear layer: ``W x + alpha / rank * b a x``.

    ``b`` starts as zeros. In a mixture-of-experts model these are the layers of attention and what every
    token passes; experts have a method of their own, ``expert_lora``.

    Args:
        rank: of what is learned.
        alpha: what is learned is scaled by it over the rank.
        dropout: share of features that the thin matrices do not see in training.
        seed: of what ``a`` starts as.

    Shapes:
        Parameters ``a [1, R, cols]`` and ``b [1, rows, R]``.

    Raises:
        SettingError: ``rank`` is not in [1, the smaller side of the matrix], or another is out of range.

    Example:
        >>> import torch
        >>> from mixtura.types import MatrixShape
        >>> shapes = {"weight": MatrixShape(6, 4)}
        >>> site = Site(name="q_proj", kind="linear", layer=0, num_layers=1, matrices=shapes)
        >>> added = Lora(site, rank=2).change(RouterInput.of(torch.eye(4))).matrices["weight"]
        >>> added.a.shape, added.b.abs().sum().item(), added.scale.tolist()
        (torch.Size([1, 2, 4]), 0.0, [8.0])
    """

    def __init__(
        self, site: Site, *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__(site)
        self.rank = self.within("rank", rank, 1, smallest_side(site.matrices))
        self.alpha = self.within("alpha", alpha, 0, 1e6)
        self.dropout = self.within("dropout", dropout, 0, 0.99)
        self.seed = seed
        self.a, self.b = thin_pair(site, "weight", [self.rank], seed)

    def change(self, inputs: RouterInput) -> Change:
        del inputs
        return Change(matrices={"weight": low_rank(self.a, self.b, self.alpha, [self.rank])})
