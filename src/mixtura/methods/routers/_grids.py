"""What routers of experts on a grid share: scores of an axis, and the routing of one."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixtura.methods._grids import grid_of
from mixtura.types import LayerShape, Routing

_EPS = 1e-5


def axes_of(shape: LayerShape) -> tuple[LayerShape, LayerShape]:
    """The rows and the columns of a layer's experts, each as if they were experts."""
    rows, columns = (LayerShape(shape.d_model, shape.d_expert, count) for count in grid_of(shape.num_experts))
    return rows, columns


def standardised(logits: Float[Tensor, "*n R"]) -> Float[Tensor, "*n R"]:
    """Logits of mean 0 and variance 1 over the last axis; zeros where all are the same."""
    centred = logits - logits.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + _EPS)


def axis(
    weights: Float[Tensor, "T R"],
    chosen: Bool[Tensor, "T R"],
    scores: Float[Tensor, "T R"],
    logits: Float[Tensor, "T R"],
    valid: Bool[Tensor, " T"],
) -> Routing:
    """The routing of the rows, or of the columns: those that were chosen, with the weights of all theirs."""
    everyone = torch.arange(weights.shape[1], device=weights.device).expand_as(chosen)
    ids = everyone.masked_fill(~chosen, weights.shape[1])
    return Routing.from_choices(ids, weights, scores=scores, logits=logits, valid=valid)
