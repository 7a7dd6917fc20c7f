"""Several experts as one: their weighted average, hidden features first put in the same order."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.checkpoints.viewing.base import LayerView
from mixtura.checkpoints.viewing.records import ExpertWeights
from mixtura.errors import UserError
from mixtura.kernels import ExpertTensors
from mixtura.types import Merge


def merged_expert(layer: LayerView, merge: Merge) -> ExpertTensors:
    """The expert that a group of a layer's experts becomes, in the layer's own layout and dtype.

    It is added up in float32, one expert after the other, so that no more than three are in memory.

    Raises:
        UserError: hidden features are to be put in order, and scipy, which does that, is not installed.
    """
    reference = layer.expert(merge.experts[0])
    total = {name: tensor.float() * merge.shares[0] for name, tensor in reference.tensors().items()}
    for expert, share in zip(merge.experts[1:], merge.shares[1:], strict=True):
        weights = layer.expert(expert)
        if merge.aligned:
            weights = reordered(weights, best_order(reference, weights))
        for name, tensor in weights.tensors().items():
            total[name] += tensor.float() * share
    dtypes = {name: tensor.dtype for name, tensor in reference.tensors().items()}
    average = {name: value.to(dtypes[name]) for name, value in total.items()}
    up, down, gate = average.pop("up"), average.pop("down"), average.pop("gate", None)
    return ExpertWeights(gate, up, down, **average).to_native(layer.layout)


def best_order(reference: ExpertWeights, other: ExpertWeights) -> Int[Tensor, " F"]:
    """The order of an expert's hidden features in which its weights are nearest to another's.

    Of all permutations the one with the least squared distance, which is that of the largest inner product:
    a linear assignment of features to features. What an expert computes does not depend on their order.

    Raises:
        UserError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError(
            "putting hidden features in order needs scipy: pip install 'mixtura[merge]', or merge without "
            "alignment"
        ) from None
    alike = torch.zeros(reference.up.shape[0], reference.up.shape[0])
    for one, two in _rows(reference, other):
        alike += one.float() @ two.float().T
    return torch.from_numpy(linear_sum_assignment(alike.numpy(), maximize=True)[1])


def reordered(weights: ExpertWeights, order: Int[Tensor, " F"]) -> ExpertWeights:
    """The same expert with its hidden features in another order."""
    rows = ("gate", "up", "gate_bias", "up_bias")
    named = weights.tensors()
    moved = {name: named[name][order] for name in rows if name in named}
    return ExpertWeights(
        gate=moved.get("gate"),
        up=moved["up"],
        down=weights.down[:, order],
        gate_bias=moved.get("gate_bias"),
        up_bias=moved.get("up_bias"),
        down_bias=weights.down_bias,
    )


def _rows(
    reference: ExpertWeights, other: ExpertWeights
) -> list[tuple[Float[Tensor, "F _"], Float[Tensor, "F _"]]]:
    """What each of two experts has for every hidden feature, matrix by matrix."""
    pairs = [(reference.up, other.up), (reference.down.T, other.down.T)]
    if reference.gate is not None and other.gate is not None:
        pairs.append((reference.gate, other.gate))
    return pairs
