"""Room behind the keys and values of a growing cache, so that a step appends instead of copying."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Tokens that a layer of a cache can grow by until it is copied again, at least; and as a share of its length.
_LEAST_SPARE: Final = 128
_SPARE_SHARE: Final = 4
_NAME: Final = "mixtura_room"


class Grown(NamedTuple):
    """Where keys and values lie that new ones were given room behind.

    Attributes:
        keys: address of the first that the new tokens see.
        values: the same.
        strides: of both, in numbers: by sequence, head, token and along a head.
        past: tokens that were there before.
    """

    keys: int
    values: int
    strides: tuple[int, ...]
    past: int


class RoomyLayer(DynamicLayer, ABC):
    """A layer of a cache that has room of its own behind its keys and values, which a step may write into."""

    @abstractmethod
    def lengthen(self, num_tokens: int) -> None:
        """Show so many tokens more, whose keys and values the caller writes."""


@final
class Room:
    """Tensors of which a layer of a cache shows a part; behind it there is room.

    A layer whose tensors are no longer those that it was given (cropped, reordered, copied) gets new room:
    what somebody else may still hold is never written over.
    """

    def __init__(self, keys: Tensor, values: Tensor, spare: int) -> None:
        num_sequences, num_heads, self.stop, width = keys.shape
        self.num_tokens = self.stop + spare
        shape = (num_sequences, num_heads, self.num_tokens, width)
        self.start = 0
        self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        self.keys[:, :, : self.stop] = keys
        self.values[:, :, : self.stop] = values
        self.strides = self.keys.stride()
        self._token_bytes = self.strides[2] * self.keys.element_size()
        self._shape = (num_sequences, num_heads, width)

    def addresses(self) -> tuple[int, int]:
        """Where the first of the keys and of the values that are shown lie."""
        # Not kept: the copy of a cache has copies of its rooms, elsewhere.
        ahead = self.start * self._token_bytes
        return self.keys.data_ptr() + ahead, self.values.data_ptr() + ahead

    def is_shown_by(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these are all that was appended."""
        num_sequences, num_heads, width = self._shape
        shape = (num_sequences, num_heads, self.stop - self.start, width)
        return (
            (keys.data_ptr(), values.data_ptr()) == self.addresses()
            and keys.shape == values.shape == shape
            and keys.stride() == values.stride() == self.strides
        )

    def shown(self) -> tuple[Tensor, Tensor]:
        """Keys and values without the room behind them."""
        length = self.stop - self.start
        return self.keys.narrow(2, self.start, length), self.values.narrow(2, self.start, length)


def growing_layer(cache: Cache, index: int, x: Tensor, num_heads: int, width: int) -> DynamicLayer | None:
    """The layer of a cache that a step may append to itself; None where ``cache.update`` must."""
    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
        return None
    layer: Any = cache.layers[index]
    return layer if can_grow(layer, x.shape[0], num_heads, width, x.dtype) else None


def can_grow(layer: Any, num_sequences: int, num_heads: int, width: int, dtype: torch.dtype) -> bool:
    """Whether a layer of a cache holds tokens of these sizes, and nothing but appending makes it longer."""
    if type(layer) is DynamicSlidingWindowLayer:
        if layer.record_past:
            return False
    elif type(layer) is not DynamicLayer and not isinstance(layer, RoomyLayer):
        return False
    if not layer.is_initialized or layer.keys.ndim != 4:
        return False
    keys, values = layer.keys, layer.values
    shape = keys.shape
    fits: bool = shape == values.shape == (num_sequences, num_heads, shape[2], width) and shape[2] > 0
    return fits and bool(keys.dtype == values.dtype == dtype)


def grow(layer: Any, num_tokens: int) -> Grown:
    """Make a layer longer by some tokens, whose keys and values the caller writes."""
    if isinstance(layer, RoomyLayer):
        past = layer.get_seq_length()
        layer.lengthen(num_tokens)
        shown: Any = layer
        return Grown(shown.keys.data_ptr(), shown.values.data_ptr(), shown.keys.stride(), past)
    room = layer.__dict__.get(_NAME)
    if (
        room is None
        or room.stop + num_tokens > room.num_tokens
        or not room.is_shown_by(layer.keys, layer.values)
    ):
        spare = max(_LEAST_SPARE, layer.keys.shape[2] // _SPARE_SHARE) + num_tokens
        room = Room(layer.keys, layer.values, spare)
        setattr(layer, _NAME, room)
    keys, values = room.addresses()
    grown = Grown(keys, values, room.strides, room.stop - room.start)
    room.stop += num_tokens
    if type(layer) is DynamicSlidingWindowLayer:
        layer.cumulative_length += num_tokens
        room.start = max(room.start, room.stop - (layer.sliding_window - 1))
    layer.keys, layer.values = room.shown()
    return grown
