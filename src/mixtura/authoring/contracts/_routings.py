"""Routings of certain kinds, and others made from them, for the checks of balancers."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mixtura.authoring.contracts._inputs import SHAPE
from mixtura.authoring.contracts._samples import sample_routing
from mixtura.types import Routing


def by_choice(routing: Routing, chosen: Int[Tensor, "T K"]) -> Routing:
    """The routing with other experts chosen, weighted by their scores."""
    return Routing.from_choices(
        chosen,
        routing.scores.gather(-1, chosen),
        scores=routing.scores,
        logits=routing.logits,
        valid=routing.valid,
    )


def even_routing() -> Routing:
    """Tokens with equal scores for all experts, each expert chosen as often as any other."""
    routing = sample_routing(0, num_tokens=64)
    logits = torch.zeros_like(routing.logits).requires_grad_()
    chosen = (torch.arange(64)[:, None] + torch.tensor([0, SHAPE.num_experts // 2])) % SHAPE.num_experts
    even = replace(routing, logits=logits, scores=logits.softmax(-1), valid=torch.ones(64, dtype=torch.bool))
    return by_choice(even, chosen)


def collapsed(expert: int) -> Routing:
    """Every token at the same two experts, and sure of it."""
    even = even_routing()
    chosen = torch.tensor([expert, (expert + 1) % SHAPE.num_experts]).expand(64, -1)
    logits = (5.0 * torch.zeros_like(even.logits).scatter(1, chosen, 1.0)).detach().requires_grad_()
    return by_choice(replace(even, logits=logits, scores=logits.softmax(-1)), chosen)


def masked(routing: Routing, kept: Bool[Tensor, " T"]) -> Routing:
    """The same routing with more of its tokens counted as padding."""
    return Routing.from_assignments(
        routing.token_ids,
        routing.expert_ids,
        routing.weights,
        scores=routing.scores,
        logits=routing.logits,
        valid=routing.valid & kept,
    )


def reordered(routing: Routing, order: Int[Tensor, " E"]) -> Routing:
    """The same routing with the experts in another order."""
    return Routing.from_assignments(
        routing.token_ids,
        order.argsort()[routing.expert_ids],
        routing.weights,
        scores=routing.scores[:, order],
        logits=routing.logits[:, order],
        valid=routing.valid,
    )
