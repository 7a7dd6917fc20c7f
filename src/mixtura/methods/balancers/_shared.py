"""Mathematics that balancers share."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UserError
from mixtura.types import BalancerInput, Routing


def needed(inputs: BalancerInput, name: str, owner: str) -> Any:
    """The field ``name``, which ``owner`` cannot do without.

    Raises:
        UserError: it was not given.
    """
    value = getattr(inputs, name)
    if value is None:
        raise UserError(f"{owner} cannot balance without {name}; give BalancerInput its {name}")
    return value


def load_shares(inputs: BalancerInput) -> Float[Tensor, " E"]:
    """Each expert's share of the assignments, without gradient; zeros where there are none."""
    counts = inputs.demand.to(inputs.routing.scores)
    return counts / counts.sum().clamp(min=1)


def lack(inputs: BalancerInput) -> Float[Tensor, " E"]:
    """What each expert lacks of the mean load, as a share of it: negative for one that has too much.

    In float32 at least, whatever the dtype of scores: what biases are moved by.
    """
    counts = inputs.demand.detach().to(torch.float32)
    return 1 - counts / counts.mean() if counts.any() else torch.zeros_like(counts)


def runs(values: Float[Tensor, "*n E"], count: int, name: str) -> Float[Tensor, "*n C R"]:
    """The values of experts as ``count`` equal runs of neighbours, called ``name`` in errors.

    Raises:
        UserError: the experts cannot be divided so.
    """
    num_experts = values.shape[-1]
    require_runs(num_experts, count, name)
    return values.reshape(*values.shape[:-1], count, num_experts // count)


def require_runs(num_experts: int, count: int, name: str) -> None:
    """Raise `UserError` unless so many experts can be divided into ``count`` equal runs, called ``name``."""
    if num_experts % count:
        raise UserError(
            f"{num_experts} experts cannot be divided into {count} {name} of one size; "
            f"choose a number of {name} that divides them"
        )


def mean_scores(routing: Routing) -> Float[Tensor, " E"]:
    """Each expert's mean score over the valid tokens."""
    valid = routing.valid.to(routing.scores)
    scores = torch.where(routing.valid[:, None], routing.scores, 0.0)
    return scores.sum(0) / valid.sum().clamp(min=1)
