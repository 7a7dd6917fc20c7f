"""How a family's checkpoints name the matrices of single experts, as transformers itself saves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from mixtura.checkpoints.packed import MATRICES, MatrixName
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.view import LayerView
from mixtura.checkpoints.viewing.mapping import EXPERT_NUMBER
from mixtura.errors import UnsupportedModelError

_ENDING = ".weight"


@final
@dataclass(frozen=True, slots=True)
class NamedRows:
    """A matrix of one expert as a checkpoint has it.

    Attributes:
        base: its name without ``.weight``.
        expert: whose it is.
        matrix: which of the two matrices of an expert it is of.
        rows: its rows of that matrix, in order.
    """

    base: str
    expert: int
    matrix: MatrixName
    rows: Int[Tensor, " R"]


def named_rows(view: CheckpointView, layer: LayerView) -> tuple[NamedRows, ...]:
    """Every matrix of a layer's experts, each under a name of its own.

    The numbers of rows go through transformers' own rules for saving in the place of weights.

    Raises:
        UnsupportedModelError: the family's checkpoints do not have a matrix of its own for each expert, or
            this one names its tensors in another way than transformers saves them.
    """
    _check_names(view, layer)
    found = []
    up, down = layer.shape.d_expert * (2 if layer.layout.has_gate else 1), layer.shape.d_model
    for matrix, parameter, height in zip(MATRICES, layer.expert_parameters, (up, down), strict=False):
        # Two columns, as some releases drop a dimension of one.
        marks = torch.arange(layer.num_experts * height).view(layer.num_experts, height, 1).repeat(1, 1, 2)
        for name, rows in _saved(view, {parameter: marks}).items():
            if rows.ndim != 2 or not name.endswith(_ENDING) or not EXPERT_NUMBER.search(name):
                raise UnsupportedModelError(
                    f"checkpoints of {view.model_type} keep all experts of a layer in one tensor ({name}), "
                    f"and compressed-tensors stores a matrix of each; leave --format out, or use --format "
                    f"gguf where llama.cpp knows the family"
                )
            numbers = rows[:, 0]
            expert = int(numbers[0]) // height
            base = name.removesuffix(_ENDING)
            found.append(NamedRows(base, expert, matrix, numbers - expert * height))
    return tuple(found)


def _check_names(view: CheckpointView, layer: LayerView) -> None:
    router = layer.site.router_weight
    if layer.layout.transposed or layer.layout.has_bias:
        raise UnsupportedModelError(
            f"experts of {view.model_type} have biases or lie transposed, which compressed-tensors has no "
            f"place for; leave --format out"
        )
    stored = view.sources[router].names
    saved = tuple(_saved(view, {router: torch.zeros(layer.num_experts, 1)}))
    if stored != saved:
        raise UnsupportedModelError(
            f"{view.path} calls a router {', '.join(stored)} where transformers saves {', '.join(saved)}; "
            f"load the model with transformers, save it again and start from that"
        )


def _saved(view: CheckpointView, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What parameters become in a checkpoint."""
    model: Any = view.meta_model
    try:
        saved: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    except ValueError as error:
        raise UnsupportedModelError(
            f"checkpoints of {view.model_type} join tensors of several layers ({error}), and "
            f"compressed-tensors stores a matrix of each expert; leave --format out"
        ) from None
    return saved
