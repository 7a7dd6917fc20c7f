"""Several objectives at once, the smaller the better: directions between them, and who beats whom."""

from __future__ import annotations

import math
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators._networks import everyone, perceptron


def directions(num_objectives: int, least: int) -> Float[Tensor, "B M"]:
    """Weights of objectives that sum to 1, evenly spaced, at least so many; one of a single objective."""
    if num_objectives == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    parts = 1
    while math.comb(num_objectives + parts - 1, parts) < least:
        parts += 1
    rows = [[parts]]
    # Each round splits the last share in two, in every way.
    for _ in range(num_objectives - 1):
        rows = [[*row[:-1], first, row[-1] - first] for row in rows for first in range(row[-1] + 1)]
    return torch.tensor(rows, dtype=torch.float64) / parts


def angles(a: Float[Tensor, "*S M"], b: Float[Tensor, "*S M"]) -> Float[Tensor, "*S"]:
    """The angle between vectors, in radians; a right one to a vector of zeros."""
    return nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-12).clamp(-1, 1).arccos()


def undominated(objectives: Float[np.ndarray, "n M"]) -> Bool[np.ndarray, " n"]:
    """Whether no other row is at least as small everywhere and smaller somewhere."""
    no_worse = (objectives[:, None] <= objectives[None]).all(-1)
    better = (objectives[:, None] < objectives[None]).any(-1)
    return np.logical_not((no_worse & better).any(0))


def choose(
    scores: Float[Tensor, "B J M"], weights: Float[Tensor, "B M"], widest: Float[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """Of each direction's candidates the one worth most along it, among those that point its way.

    A candidate points the direction's way within its ``widest`` angle; the nearest always does.
    """
    apart = angles(scores, weights[:, None].expand_as(scores))
    is_near = apart <= torch.maximum(widest, apart.min(1).values)[:, None]
    worth = (scores * weights[:, None]).sum(-1).masked_fill(~is_near, -torch.inf)
    return worth.argmax(1)


def hypervolume(objectives: Float[np.ndarray, "n 2"], worst: tuple[float, float]) -> float:
    """The area that two objectives of some rows dominate, up to the worst point."""
    area, lowest = 0.0, worst[1]
    for first, second in sorted(map(tuple, objectives[undominated(objectives)].tolist())):
        if first < worst[0] and second < lowest:
            area += (worst[0] - first) * (lowest - second)
            lowest = second
    return area


def spacing(ways: Float[Tensor, "B M"]) -> tuple[Int[Tensor, "B J"], Float[Tensor, " B"]]:
    """Each direction and the M nearest to it, itself among them; and the mean angle to these."""
    apart = angles(ways[:, None].expand(-1, len(ways), -1), ways.expand(len(ways), -1, -1))
    num = ways.shape[1]
    near = apart.argsort(dim=1)[:, : num + 1]
    return near, apart.gather(1, near).sum(1) / num


@final
class GuidedFlow(nn.Module):
    """A flow from noise to designs, and a perceptron an objective of designs."""

    def __init__(self, d_in: int, num_objectives: int, width: int) -> None:
        super().__init__()
        self.clock = nn.Linear(1, d_in)
        first, last = (nn.Linear(d_in, width), nn.SELU()), nn.Linear(width, d_in)
        self.flow = nn.Sequential(*first, nn.Linear(width, width), nn.SELU(), last)
        self.judges = nn.ModuleList(perceptron(d_in, width, 1) for _ in range(num_objectives))

    def speed(self, x: Float[Tensor, "n D"], time: Float[Tensor, "n 1"]) -> Float[Tensor, "n D"]:
        """Where points move, at a time from 0 (noise) to 1 (designs)."""
        moved: Tensor = self.flow(x + self.clock(time))
        return moved

    def objectives(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n M"]:
        """The predicted objectives."""
        return everyone(self.judges, x)[..., 0].T

    def lost(self, x: Float[Tensor, "n D"], wanted: Float[Tensor, "n M"]) -> Float[Tensor, ""]:
        """How far the flow is from straight ways to designs, and judges from their objectives."""
        noise, time = torch.randn_like(x), torch.rand_like(x[:, :1])
        speed = self.speed(noise + time * (x - noise), time)
        return F.mse_loss(speed, x - noise) + F.mse_loss(self.objectives(x), wanted)

    def ends(self, x: Float[Tensor, "n D"], time: float) -> tuple[Tensor, Tensor]:
        """How points move, and where they would end if they went straight on."""
        moved = self.speed(x, torch.full_like(x[:, :1], time))
        return moved, x + (1 - time) * moved

    def bent(
        self,
        x: Float[Tensor, "n D"],
        weights: Float[Tensor, "n M"],
        time: float,
        strength: float,
        step: float,
    ) -> Float[Tensor, "n D"]:
        """How points move when judges bend their way towards lower weighed objectives."""
        with torch.no_grad():
            moved = self.speed(x, torch.full_like(x[:, :1], time))
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            worth = -(self.objectives(at + (1 - time) * moved) * weights).sum()
            (slope,) = torch.autograd.grad(worth, at)
        return moved + strength * (1 - time) / max(time, step) * slope

    @torch.no_grad()
    def flow_down(self, owner: Any, ways: Float[Tensor, "B M"]) -> Float[Tensor, "B D"]:
        """The best design that each direction came to, of those learned and those it flowed through."""
        low, high = torch.from_numpy(owner.bounds_)
        best, num = torch.from_numpy(owner.archive_), ways.shape[1]
        worth = ((1 - self.objectives(best)) * ways).sum(1)
        near, widest = spacing(ways)
        x, step = torch.randn_like(best), 1 / owner.steps
        for place in range(owner.steps):
            time, after = place * step, (place + 1) * step
            if time < owner.guide_from:
                x = x + step * self.speed(x, torch.full_like(x[:, :1], time))
                continue
            x = x + step * self.bent(x, ways, time, owner.strength, step)
            noise = torch.randn(len(x), owner.children, x.shape[1]).to(x)
            born = x[:, None] + owner.jitter * step**0.5 * noise
            end = self.ends(born.flatten(0, 1), after)[1].clamp(low, high).view_as(born)
            scores = (1 - self.objectives(end.flatten(0, 1))).view(*born.shape[:2], num)
            rivals = scores[near].flatten(1, 2)
            taken = choose(rivals, ways, widest)
            rows = torch.arange(len(x))
            x, end = born[near].flatten(1, 2)[rows, taken], end[near].flatten(1, 2)[rows, taken]
            found = (rivals[rows, taken] * ways).sum(1)
            best = torch.where((found > worth)[:, None], end, best)
            worth = torch.maximum(found, worth)
        return best if owner.guide_from < 1 else x.clamp(low, high)
