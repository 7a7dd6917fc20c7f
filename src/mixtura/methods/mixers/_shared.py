"""Mathematics that mixers share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixtura.types import Routing


def shares(
    scores: Float[Tensor, "T E"],
    *,
    logits: Float[Tensor, "T E"],
    valid: Bool[Tensor, " T"],
    losses: Mapping[str, Float[Tensor, ""]] | None = None,
    state: Float[Tensor, "T *_"] | None = None,
) -> Routing:
    """The routing in which every expert has the share ``scores[t, e]`` in token t."""
    num_tokens, num_experts = scores.shape
    everyone = torch.arange(num_experts, device=scores.device).expand(num_tokens, -1)
    return Routing.from_choices(
        everyone, scores, scores=scores, logits=logits, valid=valid, losses=losses, state=state
    )
