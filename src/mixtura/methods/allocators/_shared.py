"""Shares within a layer: shared by allocators."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray


def within_layers(values: Float[ndarray, " M"], layers: Int[ndarray, " M"]) -> Float[ndarray, " M"]:
    """Each value as a share of its layer's sum; alike in a layer whose values are all 0."""
    num_layers = int(layers.max()) + 1
    sums, counts = np.bincount(layers, values, num_layers), np.bincount(layers, minlength=num_layers)
    whole = sums[layers]
    shares: Float[ndarray, " M"] = np.where(
        whole > 0, values / np.where(whole > 0, whole, 1), 1 / counts[layers]
    )
    return shares
