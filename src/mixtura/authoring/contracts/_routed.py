"""What a router returned, compared and summed up: what checks of routers are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixtura.authoring.contracts._core import Subject, require
from mixtura.authoring.contracts._inputs import declared
from mixtura.methods.routers import Router
from mixtura.types import RouterInput, Routing

# Closer scores than this may be ordered otherwise when other tokens are in the batch.
TIE = 1e-5


def use(router: Router, inputs: RouterInput) -> Routing:
    """Route the tokens."""
    routed: Routing = router(inputs)
    return routed


def dense(routing: Routing) -> Tensor:
    """The weights as ``[T, E]``, 0 where a token does not go."""
    if routing.gates is not None:
        rows, columns = routing.gates
        given = torch.einsum("thr,thc->trc", rows, columns).flatten(1)
        return torch.where(routing.valid[:, None], given, 0.0).detach()
    table = routing.scores.new_zeros(routing.num_tokens, routing.num_experts)
    table[routing.token_ids, routing.expert_ids] = routing.weights.to(table)
    return table.detach()


def continued(method: Subject, given: dict[str, Any]) -> dict[str, Any]:
    """The fields at the second layer: with the state that the first layer's router returned."""
    if not method.has("stateful"):
        return given
    before = use(method.create(), declared(method, given | {"generator": None}))
    return given | {"state": None if before.state is None else before.state.detach(), "layer": 1}


def total_of(routing: Routing) -> Tensor:
    """One number that everything the router returns has a part in."""
    slope = torch.linspace(-1, 1, routing.weights.numel()).to(routing.weights)
    total = (routing.weights * slope).sum() + sum(routing.losses.values())
    for part in (routing.state, routing.extra, routing.modulation, *(routing.gates or ())):
        if part is not None and part.is_floating_point():
            total = total + (part * torch.linspace(-1, 1, part.numel()).view_as(part)).sum()
    return total


def require_equal_rows(whole: Routing, part: Routing, rows: Tensor, what: str, short: bool = False) -> None:
    """The routing of tokens ``rows`` is the same; in ``part`` they come first, or alone if ``short``."""
    there = torch.arange(rows.numel()) if short or part.num_tokens != whole.num_tokens else rows
    require(torch.allclose(dense(whole)[rows], dense(part)[there], atol=TIE), f"{what} routing")
    for name in ("extra", "modulation"):
        all_rows, some = getattr(whole, name), getattr(part, name)
        if all_rows is not None and some is not None:
            require(torch.allclose(all_rows[rows], some[there], atol=TIE), f"{what} {name}")


def close(left: Routing, right: Routing) -> bool:
    """Whether two routings are the same but for the last bits."""
    pairs = [(getattr(left, name), getattr(right, name)) for name in ("extra", "modulation")]
    return torch.allclose(dense(left), dense(right), atol=1e-6) and all(
        a is None or b is None or torch.allclose(a, b, atol=1e-5) for a, b in pairs
    )
