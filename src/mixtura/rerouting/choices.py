"""A routing's assignments in the form in which families' own routers hand them to experts."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.types import Routing


def padded(routing: Routing) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
    """Each token's experts and weights in rows as long as the longest; absent ones are E with weight 0."""
    num_tokens, num_experts = routing.scores.shape
    order = torch.sort(routing.token_ids, stable=True).indices
    tokens = routing.token_ids[order]
    counts = torch.bincount(tokens, minlength=num_tokens)
    places = torch.arange(len(tokens), device=tokens.device) - (counts.cumsum(0) - counts)[tokens]
    most = max(int(counts.max()) if num_tokens else 0, 1)
    ids = torch.full((num_tokens, most), num_experts, device=tokens.device)
    weights = routing.weights.new_zeros(num_tokens, most)
    where = (tokens, places)
    return ids.index_put(where, routing.expert_ids[order]), weights.index_put(where, routing.weights[order])
