"""Giving every token one expert and every expert equally many tokens, for the greatest total score."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Each round of bidding is for an increment this much finer than the one before.
_FINER = 5.0


def balanced(scores: Float[Tensor, "T E"], *, tolerance: float = 1e-3) -> Int[Tensor, " T"]:
    """The expert of each token when none has more than T / E tokens, rounded up, by an auction.

    The total score is within ``tolerance`` times the range of scores, per token, of the greatest there
    is. Tokens bid for experts what these are worth to them above the second best; an expert keeps its
    highest bids, and its price is the lowest it keeps. A score that is not finite counts as the lowest.
    """
    num_tokens, num_experts = scores.shape
    if num_tokens == 0 or num_experts == 1:
        return torch.zeros(num_tokens, dtype=torch.long, device=scores.device)
    room = math.ceil(num_tokens / num_experts)
    known = scores.detach().double()
    finite = known.isfinite()
    lowest = known[finite].min() if finite.any() else known.new_zeros(())
    known = torch.where(finite, known, lowest)
    spread = max(float(known.max() - known.min()), 1e-6)
    # Tokens to whom all experts are worth the same take the places that are left over.
    filler = known.new_zeros(room * num_experts - num_tokens, num_experts)
    worth = torch.cat([known, filler])
    prices = worth.new_zeros(num_experts)
    increment = spread / 2
    while True:
        increment = max(increment, tolerance * spread)
        owner, prices = _auction(worth, room, prices, increment)
        if increment <= tolerance * spread:
            return owner[:num_tokens]
        increment /= _FINER


def _auction(
    worth: Float[Tensor, "N E"], room: int, prices: Float[Tensor, " E"], increment: float
) -> tuple[Int[Tensor, " N"], Float[Tensor, " E"]]:
    """The expert of each bidder once all have one, and the prices then."""
    owner = torch.full((worth.shape[0],), -1, dtype=torch.long, device=worth.device)
    bids = torch.full_like(owner, 0, dtype=worth.dtype)
    prices = prices.clone()
    while True:
        waiting = (owner < 0).nonzero().squeeze(-1)
        if waiting.numel() == 0:
            return owner, prices
        gain, wanted = (worth[waiting] - prices).topk(2)
        owner[waiting] = wanted[:, 0]
        bids[waiting] = prices[wanted[:, 0]] + (gain[:, 0] - gain[:, 1]) + increment
        asked = wanted[:, 0].unique()
        offers = torch.where(owner == asked[:, None], bids, -torch.inf)
        kept = offers.topk(room, dim=1)
        full = kept.values[:, -1] > -torch.inf
        prices[asked[full]] = kept.values[full, -1]
        held = torch.zeros_like(offers, dtype=torch.bool).scatter(1, kept.indices, True)
        owner[((offers > -torch.inf) & ~held).any(0)] = -1
