"""Where the sequences of a whole step stand: all in one cache, or each in its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import DynamicCache

from mixtura.kernels.compiled import native
from mixtura.kernels.several import SideBySide
from mixtura.kernels.step_cache import grow
from mixtura.kernels.step_calls import Turns, grown_place, mask_of


def texts_of(cached: Any) -> tuple[DynamicCache, ...]:
    """The caches of a step: those of several texts, or the one of all sequences."""
    return cached.caches if type(cached) is SideBySide else (cached,)


def place_of(layers: Sequence[Any], turns: Turns) -> Any:
    """The extension's record of where a layer's new tokens stand; makes room for them."""
    first, *rest = [grow(layer, 1) for layer in layers]
    if not rest:
        return grown_place(turns, first, mask_of(None))
    extension = native()
    assert extension is not None
    nowhere = extension.Cached(0, 0, 0, 0)
    place = extension.Place(*turns, nowhere, nowhere, 0, mask_of(None))
    for one in (first, *rest):
        strides = one.strides[:3]
        place.seat(extension.Cached(one.keys, *strides), extension.Cached(one.values, *strides), one.past)
    return place
