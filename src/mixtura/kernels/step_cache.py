"""Room behind the keys and values of a growing cache, so that a step appends instead of copying."""

from __future__ import annotations

from typing import Any, Final, final

from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Tokens that a layer of a cache can grow by until it is copied again, at least; and as a share of its length.
_LEAST_SPARE: Final = 128
_SPARE_SHARE: Final = 4
_NAME: Final = "mixtura_room"


@final
class Room:
    """Tensors of which a layer of a cache shows a part; behind it there is room.

    A layer whose tensors are no longer those that it was given (cropped, reordered, copied) gets new room:
    what somebody else may still hold is never written over.
    """

    def __init__(self, keys: Tensor, values: Tensor, spare: int) -> None:
        num_sequences, num_heads, self.stop, width = keys.shape
        shape = (num_sequences, num_heads, self.stop + spare, width)
        self.start = 0
        self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        self.keys[:, :, : self.stop] = keys
        self.values[:, :, : self.stop] = values

    def is_shown_by(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these are all that was appended."""
        return _is_part(keys, self.keys, self.start, self.stop) and _is_part(
            values, self.values, self.start, self.stop
        )

    def shown(self) -> tuple[Tensor, Tensor]:
        """Keys and values without the room behind them."""
        length = self.stop - self.start
        return self.keys.narrow(2, self.start, length), self.values.narrow(2, self.start, length)


def _is_part(part: Tensor, whole: Tensor, start: int, stop: int) -> bool:
    return (
        part.data_ptr() == whole.data_ptr() + start * whole.stride(2) * whole.element_size()
        and part.shape[2] == stop - start
        and part.shape[:2] == whole.shape[:2]
        and part.stride() == whole.stride()
    )


def growing_layer(cache: Cache, index: int, x: Tensor, num_heads: int, width: int) -> DynamicLayer | None:
    """The layer of a cache that a step may append to itself; None where ``cache.update`` must."""
    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
        return None
    layer: Any = cache.layers[index]
    if type(layer) is DynamicSlidingWindowLayer:
        if layer.record_past:
            return None
    elif type(layer) is not DynamicLayer:
        return None
    if not layer.is_initialized or layer.keys.ndim != 4 or not layer.keys.shape[2]:
        return None
    expected = (x.shape[0], num_heads, layer.keys.shape[2], width)
    if layer.keys.shape != expected or layer.values.shape != expected:
        return None
    return layer if layer.keys.dtype == layer.values.dtype == x.dtype else None


def grow(
    layer: Any, num_tokens: int
) -> tuple[Float[Tensor, "S heads total width"], Float[Tensor, "S heads total width"]]:
    """Make a layer longer by some tokens, whose keys and values the caller writes; gives all of them."""
    room = layer.__dict__.get(_NAME)
    if (
        room is None
        or not room.is_shown_by(layer.keys, layer.values)
        or room.stop + num_tokens > room.keys.shape[2]
    ):
        spare = max(_LEAST_SPARE, layer.keys.shape[2] // _SPARE_SHARE) + num_tokens
        room = Room(layer.keys, layer.values, spare)
        setattr(layer, _NAME, room)
    room.stop += num_tokens
    keys, values = room.shown()
    if type(layer) is DynamicSlidingWindowLayer:
        layer.cumulative_length += num_tokens
        room.start = max(room.start, room.stop - (layer.sliding_window - 1))
        layer.keys, layer.values = room.shown()
    else:
        layer.keys, layer.values = keys, values
    return keys, values
