"""LoRA whose single ranks are experts."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact_logits
from mixtura.methods.adapters import Adapter
from mixtura.methods.adapters._shared import site_seed, smallest_side, thin_pair
from mixtura.types import Change, LowRank, Progress, RouterInput, Site

METHOD = {
    "paper": 184,
    "title": "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning",
    "tags": ["changes:linear", "reads:loads", "acts_on_steps"],
}


@final
class SMora(Adapter):
    """Fine-tune one LoRA of which each token uses some of the ranks: every rank is an expert of its own.

    A router chooses each token's ranks, and biases that move with the load, a step at a time, keep all in use
    without a loss. The finest experts that LoRA has, for many tasks at once. It cannot be merged, because
    tokens decide.

    Args:
        rank: ranks that there are, M.
        top_k: ranks that a token uses.
        alpha: what they learn is scaled by it over ``top_k``.
        dropout: share of features that the thin matrices do not see in training.
        weight: by what a chosen rank counts: ``one``, its gradient that of the router's softmax, or
            ``softmax`` over the mean of the chosen.
        rate: by how much a bias moves in a step; 0 leaves them alone.
        seed: of what ``a`` and the router start as.

    Shapes:
        Parameters ``a [M, 1, cols]``, ``b [M, rows, 1]`` and ``gate [M, cols]``; the buffer ``bias [M]``.

    Raises:
        SettingError: ``rank`` is not in [1, the smaller side of the matrix], or another is out of range.

    Example:
        >>> from mixtura.types import MatrixShape
        >>> shapes = {"weight": MatrixShape(6, 4)}
        >>> site = Site(name="q_proj", kind="linear", layer=0, num_layers=4, matrices=shapes)
        >>> made = SMora(site, rank=4, top_k=2).change(RouterInput.of(torch.eye(4)))
        >>> made.shares.sum(-1).tolist()
        [2.0, 2.0, 2.0, 2.0]

    Differences from the paper:
        A chosen rank counts in full by default, its gradient going past the choice; which value the paper
        gives it was not to be found out. Scaled by ``top_k``, so that a token that uses all has plain LoRA.
        Ranks that are not chosen are multiplied by zero: no sparse kernel. 8 of 16 ranks, where the paper has
        8 of 64.

    Reference:
        Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning (paper
        184, abstract).
    """

    bias: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 16,
        top_k: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        weight: Literal["one", "softmax"] = "one",
        rate: float = 0.001,
        seed: int = 0,
    ) -> None:
        super().__init__(site)
        self.rank = self.within("rank", rank, 1, smallest_side(site.matrices))
        self.top_k = self.within("top_k", top_k, 1, rank)
        self.alpha = self.within("alpha", alpha, 0, 1e6)
        self.dropout = self.within("dropout", dropout, 0, 0.99)
        self.rate = self.within("rate", rate, 0, 1)
        if weight not in ("one", "softmax"):
            raise SettingError(f"weight of SMora must be one or softmax, got {weight!r}")
        self.weight, self.seed = weight, seed
        self.a, self.b = thin_pair(site, "weight", [1] * rank, seed)
        self.gate = drawn(site_seed(site, seed, "gate"), rank, site.matrices["weight"].cols)
        self.register_buffer("bias", torch.zeros(rank))

    def change(self, inputs: RouterInput) -> Change:
        scores = exact_logits(inputs.x, self.gate).softmax(-1)
        shares = self.chosen(scores)
        scale = torch.full((self.rank,), self.alpha / self.top_k, dtype=torch.float64)
        return Change(matrices={"weight": LowRank(self.a, self.b, scale)}, shares=shares)

    def chosen(self, scores: Float[Tensor, "T M"]) -> Float[Tensor, "T M"]:
        """What each rank counts for each token."""
        ordered = torch.sort(scores.detach() + self.bias, dim=-1, descending=True, stable=True).indices
        mask = torch.zeros_like(scores).scatter(-1, ordered[:, : self.top_k], 1.0)
        if self.weight == "one":
            return mask * (1 + (scores - scores.detach()))
        kept = scores * mask
        return self.top_k * kept / kept.sum(-1, keepdim=True)

    def before_step(self, progress: Progress) -> None:
        if progress.loads is not None:
            self.bias += (self.rate * (progress.loads.mean() - progress.loads).sign()).to(self.bias)
