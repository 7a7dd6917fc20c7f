"""Room for so many tokens an expert, and what becomes of those that find none."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixtura.types import Routing

Order = Literal["arrival", "weight"]
Overflow = Literal["drop", "next"]


def room(valid: Bool[Tensor, " T"], num_experts: int, factor: float, top_k: int = 1) -> int:
    """Tokens an expert has room for: ``factor`` times its even share of ``top_k`` each, rounded up."""
    return math.ceil(factor * top_k * int(valid.sum()) / num_experts)


def places_in_rounds(
    chosen: Int[Tensor, "T K"], priority: Float[Tensor, " T"], valid: Bool[Tensor, " T"], num_experts: int
) -> Int[Tensor, "T K"]:
    """Each choice's place at its expert, from 0: first all first choices, then all second ones, and so on.

    In each round tokens of higher ``priority`` go before others, of equal ones the earlier. Padding and
    absent choices, of ids of E or more, stand in no expert's queue.
    """
    order = torch.sort(priority.detach(), descending=True, stable=True).indices
    asked = chosen.clamp(max=num_experts).masked_fill(~valid[:, None], num_experts)[order].T.flatten()
    by_expert = torch.sort(asked, stable=True)
    counts = torch.bincount(asked, minlength=num_experts + 1)
    places = torch.arange(asked.numel(), device=asked.device) - (counts.cumsum(0) - counts)[by_expert.values]
    places = torch.empty_like(places).scatter(0, by_expert.indices, places)
    return torch.empty_like(chosen).index_copy(0, order, places.view(chosen.shape[1], -1).T.contiguous())


def limit(
    routing: Routing, capacity: int, *, order: Order = "arrival", overflow: Overflow = "drop"
) -> Routing:
    """The routing in which no expert has more than ``capacity`` tokens.

    Args:
        routing: without a limit.
        capacity: most tokens of an expert.
        order: who goes first: tokens that come earlier in the batch, or those of higher weight.
        overflow: what becomes of an assignment without room: it is dropped, or goes to the expert of
            the token's next highest score that has room, weighted as much less as its score is lower.

    ``demand`` keeps the load there would have been.
    """
    fits = _queue(routing, order) < capacity
    limited = replace(_only(routing, fits), demand=routing.load)
    if overflow == "drop" or bool(fits.all()):
        return limited
    return _rerouted(limited, _only(routing, ~fits), capacity)


def _queue(routing: Routing, order: Order) -> Int[Tensor, " N"]:
    """Each assignment's place in its expert's queue."""
    if order == "arrival":
        return routing.rank
    by_weight = torch.sort(routing.weights.detach(), descending=True, stable=True).indices
    sorted_ids = by_weight[torch.sort(routing.expert_ids[by_weight], stable=True).indices]
    return torch.empty_like(routing.rank).scatter(0, sorted_ids, routing.rank)


def _only(routing: Routing, kept: Bool[Tensor, " N"]) -> Routing:
    rows = kept.nonzero().squeeze(-1)
    return replace(
        routing,
        token_ids=routing.token_ids[rows],
        expert_ids=routing.expert_ids[rows],
        weights=routing.weights[rows],
    )


def _rerouted(routing: Routing, lost: Routing, capacity: int) -> Routing:
    """The routing with each lost assignment at its token's next best expert with room, if there is one."""
    scores = routing.scores.detach()
    taken = torch.zeros_like(scores, dtype=torch.bool)
    for part in (routing, lost):
        taken[part.token_ids, part.expert_ids] = True
    free = capacity - routing.load
    rows: list[int] = []
    experts: list[int] = []
    for row, token in enumerate(lost.token_ids.tolist()):
        open_scores = scores[token].masked_fill(taken[token] | (free <= 0), -torch.inf)
        if open_scores.max() == -torch.inf:
            continue
        expert = int(open_scores.argmax())
        taken[token, expert] = True
        free[expert] -= 1
        rows.append(row)
        experts.append(expert)
    old, new = torch.tensor(rows, dtype=torch.long), torch.tensor(experts, dtype=torch.long)
    old, new = old.to(lost.token_ids.device), new.to(lost.token_ids.device)
    tokens = lost.token_ids[old]
    ratio = routing.scores[tokens, new] / routing.scores[tokens, lost.expert_ids[old]]
    again = Routing.from_assignments(
        torch.cat([routing.token_ids, tokens]),
        torch.cat([routing.expert_ids, new]),
        torch.cat([routing.weights, lost.weights[old] * ratio.to(lost.weights.dtype)]),
        scores=routing.scores,
        logits=routing.logits,
        valid=routing.valid,
    )
    return replace(routing, token_ids=again.token_ids, expert_ids=again.expert_ids, weights=again.weights)
