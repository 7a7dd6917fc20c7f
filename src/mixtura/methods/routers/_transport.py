"""Sparse transport of tokens to experts: so much mass from each, to so few tokens an expert."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# The first step of a token's price, in units of similarity, and what Adam remembers of gradients.
_STEP, _MEAN, _SQUARE = 0.03, 0.9, 0.999


def sparse_plan(
    similarity: Float[Tensor, "n E"], capacity: int, *, regularization: float = 1.0, num_iterations: int = 50
) -> Float[Tensor, "n E"]:
    """The plan of most similarity, less ``regularization / 2`` times its square, with few tokens an expert.

    Every token has the mass 1. An expert takes exactly n / E, from ``capacity`` tokens at most. As which
    tokens an expert takes jumps with the tokens' prices, a token's mass is as near to 1 as the solution of
    the dual problem allows, not nearer. The gradient is that of the plan at fixed prices.
    """
    if similarity.numel() == 0:
        return similarity
    prices = solved_prices(similarity.detach(), capacity, regularization, num_iterations)
    return _taken(similarity + prices, capacity, regularization)


def solved_prices(
    similarity: Float[Tensor, "n E"], capacity: int, regularization: float, num_iterations: int
) -> Float[Tensor, "n 1"]:
    """What is paid for each token, for the dual problem's lowest value: Adam's steps, ever smaller ones.

    The value has kinks, at which a step may make it larger: the best prices met are kept.
    """
    prices = torch.zeros_like(similarity[:, :1])
    mean, square, lowest, found = prices, prices, torch.inf, prices
    last = min(0.01, (5 / num_iterations) ** 2)
    for step in range(num_iterations):
        plan = _taken(similarity + prices, capacity, regularization)
        gain = plan * (similarity + prices) - regularization / 2 * plan.square()
        value = float((gain.sum(-1, keepdim=True) - prices).mean())
        if value < lowest:
            lowest, found = value, prices
        slope = plan.sum(-1, keepdim=True) - 1
        mean, square = mean.lerp(slope, 1 - _MEAN), square.lerp(slope.square(), 1 - _SQUARE)
        size = _STEP * max(regularization, 1.0) * last ** (step / max(num_iterations - 1, 1))
        spread = (square / (1 - _SQUARE ** (step + 1))).sqrt() + 1e-8
        prices = prices - size * mean / (1 - _MEAN ** (step + 1)) / spread
    return found


def _taken(worth: Float[Tensor, "n E"], capacity: int, regularization: float) -> Float[Tensor, "n E"]:
    """What each expert takes for itself: of its best ``capacity`` tokens, the nearest masses of its share."""
    top = torch.sort(worth / regularization, dim=0, descending=True, stable=True)
    values = top.values[:capacity]
    # Lower all by what leaves the expert its share of the mass when negative ones are cut to 0.
    counts = torch.arange(1, values.shape[0] + 1, device=values.device)[:, None]
    levels = (values.cumsum(0) - worth.shape[0] / worth.shape[1]) / counts
    last = (values > levels).sum(0, keepdim=True) - 1
    mass = (values - levels.gather(0, last)).relu()
    return torch.zeros_like(worth).scatter(0, top.indices[:capacity], mass)
