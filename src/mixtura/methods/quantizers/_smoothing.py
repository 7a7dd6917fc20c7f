"""Scales of input features that make them alike in size before a matrix is rounded."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods.quantizers import LayerSeen

# Largest inputs and weights are not taken to be smaller than this.
_LEAST = 1e-5
# Beyond a quartile by so many distances between them a feature may be an outlier.
_FAR = 1.5


def balanced_inputs(layer: LayerSeen, most: int) -> dict[int, Float[Tensor, "n D"]]:
    """The first tokens of each expert, as many of each; of the whole layer where an expert has none."""
    found = {}
    for expert in layer.experts:
        own = (layer.index == expert).any(-1).nonzero().flatten()[:most]
        found[expert] = layer.hidden[own] if len(own) else layer.hidden[:most]
    return found


def merged_scales(layer: LayerSeen, alpha: float, most: int) -> Float[Tensor, " D"]:
    """One scale a feature for all experts of a layer and its router: the largest that any would have."""
    readers = [(rows, layer.first(expert)) for expert, rows in balanced_inputs(layer, most).items()]
    wanted = [_scales(rows, matrix, alpha) for rows, matrix in (*readers, (layer.hidden, layer.router))]
    return normalised(torch.stack(wanted).amax(0))


def outlier_scales(sizes: Float[Tensor, " C"], quantile: float, power: float) -> Float[Tensor, " C"]:
    """Scales for features that stand out, 1 for the others.

    Candidates lie far above the upper quantile; of these, those stand out that are on the upper side of the
    threshold between whose sides the means differ most (Otsu's). Each is brought down towards the largest of
    the others, by a power of how many times as large it is.
    """
    low, high = torch.quantile(sizes, torch.tensor([1 - quantile, quantile]))
    limit = float(high + _FAR * (high - low))
    candidates = sizes[sizes > limit].sort().values
    if len(candidates) > 1:
        limit = _threshold(candidates)
    stands_out = sizes > limit
    usual = sizes[~stands_out].amax() if bool((~stands_out).any()) else sizes.new_zeros(())
    if not bool(usual > 0):
        return torch.ones_like(sizes)
    return torch.where(stands_out, (sizes / usual) ** power, 1.0)


def normalised(scales: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
    """With a geometric mean of 1, as bfloat16 has them; scales as such cancel."""
    return (scales / scales.log().mean().exp()).to(torch.bfloat16).float()


def _scales(rows: Tensor, matrix: Tensor, alpha: float) -> Float[Tensor, " D"]:
    """Large where a feature is large and its weights are small."""
    largest = rows.float().abs().amax(0) if len(rows) else torch.ones(matrix.shape[1])
    weights = matrix.float().abs().amax(0)
    return largest.clamp(min=_LEAST) ** alpha / weights.clamp(min=_LEAST) ** (1 - alpha)


def _threshold(ordered: Float[Tensor, " n"]) -> float:
    """Of ascending numbers the last of the lower class, where the variance between two classes is largest."""
    counts = torch.arange(1, len(ordered))
    below = ordered.cumsum(0)[:-1] / counts
    above = (ordered.sum() - ordered.cumsum(0)[:-1]) / (len(ordered) - counts)
    between = counts * (len(ordered) - counts) * (above - below).square()
    return float(ordered[int(between.argmax())])
