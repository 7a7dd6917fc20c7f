"""What routing did between two lines of a training's log, by MoE layer and over all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from mixtura.methods._scores import entropy
from mixtura.types import Routing

_SUMS = 4


@final
class RoutingMeter:
    """Sums over tokens: load, what was dropped, entropy of scores, size of the router's logits."""

    def __init__(self) -> None:
        self._sums: list[Float[Tensor, " C"]] = []

    @torch.no_grad()
    def add(self, routings: Sequence[Routing]) -> None:
        """Count the routing of a micro-batch."""
        found = [_sums(one) for one in routings]
        self._sums = [a + b for a, b in zip(self._sums, found, strict=True)] if self._sums else found

    def take(self) -> list[dict[str, Any]]:
        """The metrics since the last call, one dict a layer; every process calls it.

        ``load`` are shares that sum to one, ``entropy`` is a share of the greatest possible,
        ``dropped`` a share of what was asked for, ``dead`` the experts that got nothing.
        """
        sums, self._sums = self._sums, []
        if sums and dist.is_available() and dist.is_initialized():
            flat = torch.cat(sums)
            dist.all_reduce(flat)
            sums = list(flat.split([len(one) for one in sums]))
        return [_described(one) for one in sums]


def _sums(routing: Routing) -> Float[Tensor, " C"]:
    valid = routing.valid
    scores = routing.scores.detach().double()[valid]
    shares = scores / scores.sum(-1, keepdim=True).clamp(min=1e-12)
    norms = routing.logits.detach().double()[valid].norm(dim=-1)
    asked = routing.load.sum() if routing.demand is None else routing.demand.sum()
    totals = [valid.sum().double(), asked.double(), entropy(shares.clamp(min=0)).sum(), norms.sum()]
    return torch.cat([torch.stack(totals), routing.load.double()])


def _described(sums: Float[Tensor, " C"]) -> dict[str, Any]:
    num_tokens, asked, entropies, norms = sums[:_SUMS].tolist()
    load = sums[_SUMS:]
    given = float(load.sum())
    shares = load / max(given, 1.0)
    most = torch.log(torch.tensor(float(max(len(load), 2)))).item()
    return {
        "load": [round(share, 5) for share in shares.tolist()],
        "max_over_mean": round(float(shares.max() * len(load)), 4),
        "entropy": round(entropies / max(num_tokens, 1) / most, 5),
        "dropped": round(1 - given / asked, 5) if asked else 0.0,
        "dead": int((load == 0).sum()),
        "logit_norm": round(norms / max(num_tokens, 1), 5),
        "experts_per_token": round(given / max(num_tokens, 1), 4),
    }
