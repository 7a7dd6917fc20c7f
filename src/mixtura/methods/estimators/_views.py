"""Several fixed views of the same row as tokens, and a block that lets one view read the others."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators._networks import dense_routing
from mixtura.types import Routing


def cosines(num: int) -> Float[Tensor, "D D"]:
    """The orthogonal cosine transform of so many values, a row a frequency."""
    at, frequency = torch.arange(num, dtype=torch.float64) + 0.5, torch.arange(num, dtype=torch.float64)
    made = torch.cos(math.pi / num * frequency[:, None] * at) * (2 / num) ** 0.5
    made[0] /= 2**0.5
    basis: Tensor = made
    return basis


def components(x: Float[Tensor, "n D"]) -> Float[Tensor, "D D"]:
    """Principal directions of rows, a row each, the widest first; their largest entry is above zero."""
    _, found = torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)))
    rows = found.T.flip(0)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    signed: Tensor = rows * largest.sign()
    return signed


def slopes(num: int) -> Float[Tensor, "D D"]:
    """The difference of each value from the one before it; the first is itself."""
    plain = torch.eye(num, dtype=torch.float64)
    return plain - plain.roll(1, 0).tril(-1)


def pieces(x: Float[Tensor, "n D"], size: int) -> Float[Tensor, "n P S"]:
    """Rows in pieces of a size, the last filled up with zeros."""
    cut: Tensor = F.pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size))
    return cut


@final
class CrossBlock(nn.Module):
    """Tokens read those of the views that a gate likes best, then each other, then a SwiGLU.

    At the start every output projection is zero, so that tokens go through as they are, and the gate is even.
    """

    def __init__(self, width: int, num_views: int, d_question: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Sequential(
            nn.Linear(d_question + width, width), nn.GELU(), nn.Linear(width, num_views)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_views + 2))
        self.others = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_views))
        self.crosses = nn.ModuleList(_attention(width) for _ in range(num_views))
        self.attention = _attention(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        for weight in (*self.gate[-1].parameters(), *self.down.parameters()):
            nn.init.zeros_(weight)

    def route(
        self, x: Float[Tensor, "n P W"], question: Float[Tensor, "n Q"], named: Bool[Tensor, "n E"]
    ) -> Routing:
        """The best views of those named, weights summing to 1."""
        logits = self.gate(torch.cat([question, x.mean(1)], dim=-1)).masked_fill(~named, -1e6)
        shares = logits.softmax(-1)
        kept = shares.argsort(dim=1, descending=True, stable=True)[:, : self.top_k]
        taken = torch.zeros_like(named).scatter(1, kept, True) & named
        weights = shares * taken
        return dense_routing(weights / weights.sum(1, keepdim=True), logits, present=taken)

    def forward(
        self, x: Float[Tensor, "n P W"], views: Float[Tensor, "E n P W"], routing: Routing
    ) -> Float[Tensor, "n P W"]:
        """The tokens after the block; a view that no row takes is not read."""
        added = torch.zeros_like(x)
        ends = routing.offsets.tolist()
        for view, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > begin:
                rows = routing.token_ids[begin:end]
                seen = self.others[view](views[view][rows])
                made = self.crosses[view](self.norms[view](x[rows]), seen, seen, need_weights=False)[0]
                added = added.index_add(0, rows, made * routing.weights[begin:end, None, None])
        x = x + added
        mine = self.norms[-2](x)
        x = x + self.attention(mine, mine, mine, need_weights=False)[0]
        left, right = self.up(self.norms[-1](x)).chunk(2, dim=-1)
        made_last: Tensor = x + self.down(F.silu(left) * right)
        return made_last


def _attention(width: int) -> Any:
    made = nn.MultiheadAttention(width, 1, batch_first=True)
    nn.init.zeros_(made.out_proj.weight)
    nn.init.zeros_(made.out_proj.bias)
    return made
