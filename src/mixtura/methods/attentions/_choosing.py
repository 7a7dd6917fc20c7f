"""Ranks of tokens by score, among all of a sequence or among those so far."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Queries that are compared with all tokens before them at once, so that memory grows with the text alone.
_BLOCK = 256
Ranks = tuple[Int[Tensor, "B Q H"], Int[Tensor, "B Q _"]]


def ranks_in_sequence(scores: Float[Tensor, "B Q H"], sequence_ids: Int[Tensor, "B Q"]) -> Ranks:
    """Each token's place among its sequence's by falling score, from 0, and how many tokens that has.

    Of equal scores the earlier token is first. Tokens of a score of minus infinity are not counted.
    """
    flat, ids = scores.flatten(0, 1), sequence_ids.flatten()
    by_score = flat.sort(dim=0, descending=True, stable=True).indices
    order = by_score.gather(0, ids[by_score].sort(dim=0, stable=True).indices)
    sizes = torch.bincount(ids) if ids.numel() else ids
    starts = sizes.cumsum(0) - sizes
    places = torch.arange(len(ids), device=ids.device)[:, None]
    ranks = torch.empty_like(order).scatter_(0, order, places - starts[ids[order]])
    counted = torch.zeros_like(sizes).index_add_(0, ids, (flat[:, :1] > -torch.inf).any(-1).to(sizes))
    return ranks.view(scores.shape), counted[ids].view(*scores.shape[:2], 1)


def ranks_before(
    scores: Float[Tensor, "B Q H"],
    earlier: Float[Tensor, "B P H"] | None,
    sequence_ids: Int[Tensor, "B Q"],
    first: bool = False,
) -> Ranks:
    """Each token's place by falling score among those of its sequence so far, and how many these are.

    Args:
        scores: minus infinity for padding.
        earlier: of tokens that were seen in earlier calls, all of the row's one sequence.
        sequence_ids: of the tokens at hand.
        first: whether the first of the earlier tokens comes before all others.
    """
    past = scores[:, :0] if earlier is None else earlier.to(scores)
    if first and past.shape[1]:
        begins = (past[..., :1] > -torch.inf).to(torch.int8).argmax(dim=1, keepdim=True)
        past = past.scatter(1, begins.expand(-1, -1, past.shape[-1]), torch.inf)
    known = torch.cat([past, scores], dim=1)
    mine = sequence_ids if earlier is None else torch.zeros_like(sequence_ids)
    theirs = torch.cat([mine.new_zeros(past.shape[:2]), mine], dim=1)
    places = torch.arange(known.shape[1], device=known.device)
    ranks, counts = [], []
    for start in range(0, scores.shape[1], _BLOCK):
        own = scores[:, start : start + _BLOCK, None]
        at = places[past.shape[1] + start :][: own.shape[1], None]
        before = (mine[:, start : start + _BLOCK, None] == theirs[:, None]) & (places <= at)
        seen = known[:, None]
        higher = (seen > own) | ((seen == own) & (places < at)[..., None])
        ranks.append((higher & before[..., None]).sum(2))
        counts.append((before & (known[..., :1] > -torch.inf).any(-1)[:, None]).sum(2))
    if not ranks:
        empty = scores.new_zeros(scores.shape, dtype=torch.long)
        return empty, empty[..., :1]
    return torch.cat(ranks, dim=1), torch.cat(counts, dim=1)[..., None]
