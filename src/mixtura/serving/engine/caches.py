"""Caches of keys and values of running texts: what they take, and copies of their beginnings."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from mixtura.machine.releases import returned_cache, with_cache
from mixtura.running.generation import ReservedLayer, reserved_cache

# Texts of two lengths tell what a token takes; the room behind growing layers is taken in blocks.
_PROBES: Final = (8, 24)
_GROWING_FACTOR: Final = 2
_GROWING_SPARE: Final = 256


@final
@dataclass(frozen=True, slots=True)
class CacheCost:
    """What the cache of one text takes.

    Attributes:
        token_bytes: for each token it may grow to.
        fixed_bytes: besides.
        windowed_bytes: for each token as well, but for no more than ``window`` of them.
        window: tokens that layers hold which see a window only, with those of a part of a prompt.
    """

    token_bytes: int
    fixed_bytes: int
    windowed_bytes: int = 0
    window: int = 0

    def of(self, num_tokens: int) -> int:
        """Bytes of a text of so many tokens."""
        windowed = self.windowed_bytes * min(num_tokens, self.window)
        return self.fixed_bytes + self.token_bytes * num_tokens + windowed

    def tokens_in(self, num_bytes: int) -> int:
        """Tokens of one text that find room in so many bytes."""
        within = (num_bytes - self.fixed_bytes) // max(self.token_bytes + self.windowed_bytes, 1)
        if within > self.window:
            within = (num_bytes - self.of(0) - self.windowed_bytes * self.window) // max(self.token_bytes, 1)
        return max(0, within)


@torch.no_grad()
def measured_cost(model: PreTrainedModel) -> CacheCost:
    """What texts take, from two short ones that are read.

    Layers whose room is taken once take exactly that; others grow by copies, and twice what they hold is
    counted.
    """
    short, long = (_held_after(model, num) for num in _PROBES)
    num = _PROBES[1] - _PROBES[0]
    growing = max(0, long.growing - short.growing) / num
    # Of the short one: a window may well be full after the long one.
    windowed = short.windowed / _PROBES[0]
    still = max(0, short.growing - int(growing * _PROBES[0]))
    return CacheCost(
        token_bytes=math.ceil((long.reserved - short.reserved) / num + _GROWING_FACTOR * growing),
        fixed_bytes=_GROWING_FACTOR * still + (int(growing * _GROWING_SPARE) if growing else 0),
        windowed_bytes=math.ceil(_GROWING_FACTOR * windowed),
        window=long.window + _GROWING_SPARE if long.window else 0,
    )


class _Held(NamedTuple):
    """Bytes by kinds of layers, and the longest window of those that have one."""

    reserved: int
    windowed: int
    growing: int
    window: int


def _held_after(model: PreTrainedModel, num: int) -> _Held:
    """What a cache holds once so many tokens were read."""
    cache = reserved_cache(model, num)
    ids = torch.zeros(1, num, dtype=torch.int64, device=model.device)
    outputs: Any = model(input_ids=ids, use_cache=True, logits_to_keep=1, **with_cache(cache))
    made = returned_cache(outputs)
    layers = getattr(made, "layers", None)
    if layers is None:
        return _Held(0, 0, _num_bytes([made]), 0)
    exact = [layer for layer in layers if isinstance(layer, ReservedLayer)]
    sliding = [layer for layer in layers if type(layer) is DynamicSlidingWindowLayer]
    rest = [layer for layer in layers if layer not in exact and layer not in sliding]
    window = max((int(layer.sliding_window) for layer in sliding), default=0)
    return _Held(sum(one.num_bytes for one in exact), _num_bytes(sliding), _num_bytes(rest), window)


def _num_bytes(held: Sequence[Any]) -> int:
    found: dict[int, int] = {}
    for one in held:
        for value in tree_leaves(list(getattr(one, "__dict__", {}).values())):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def holds_all(cache: Any, num_tokens: int) -> bool:
    """Whether every layer of a cache of so many tokens still has keys and values of each of them."""
    layers = getattr(cache, "layers", None) or ()
    return bool(layers) and all(_layer_holds_all(layer, num_tokens) for layer in layers)


def _layer_holds_all(layer: Any, num_tokens: int) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return num_tokens < int(layer.sliding_window)
    # Layers that share another's keys and values, or keep none, hold nothing of their own.
    return isinstance(layer, ReservedLayer) and (not layer.is_initialized or layer.keys is not None)


def beginning_of(
    model: PreTrainedModel, cache: Any, num_tokens: int, room: int, *, consume: bool = False
) -> Cache | None:
    """A cache with room for ``room`` tokens that holds a copy of the first ``num_tokens`` of another's.

    The other must hold all of them, or be exactly so long. With ``consume`` its layers are given back one by
    one, so that there are never two of the whole.
    """
    made = reserved_cache(model, room)
    if made is None:
        return None
    for place, layer in enumerate(cache.layers):
        if consume:
            cache.layers[place] = None
        if place >= len(made.layers):
            made.layers.append(copy.deepcopy(layer))
        elif not isinstance(layer, ReservedLayer):
            made.layers[place] = _cut(layer, num_tokens)
        elif layer.is_initialized and layer.keys is not None:
            made.layers[place].update(*_first(layer, num_tokens))
    return made


def _first(layer: Any, num_tokens: int) -> tuple[Tensor, Tensor]:
    return layer.keys[..., :num_tokens, :], layer.values[..., :num_tokens, :]


def _cut(layer: Any, num_tokens: int) -> Any:
    """A copy of a layer's first tokens, for a layer that is as long as that or has all of them."""
    if type(layer) is not DynamicSlidingWindowLayer or layer.cumulative_length <= num_tokens:
        return copy.deepcopy(layer)
    made = copy.copy(layer)
    # Room behind its keys and values that a step has made belongs to the other.
    made.__dict__.pop("mixtura_room", None)
    made.keys, made.values = (one.clone() for one in _first(layer, num_tokens))
    made.cumulative_length = num_tokens
    return made


def trim(cache: Any, num_tokens: int) -> None:
    """Give back the room behind the tokens of a cache, one layer after the other."""
    for place, layer in enumerate(cache.layers):
        if isinstance(layer, ReservedLayer) and layer.is_initialized and layer.keys is not None:
            tight = ReservedLayer(num_tokens)
            tight.update(*_first(layer, num_tokens))
            cache.layers[place] = tight


def shorten(cache: Any, num_tokens: int) -> None:
    """Take back tokens behind the first so many of a cache that holds them all."""
    for layer in cache.layers:
        if isinstance(layer, ReservedLayer):
            layer.shorten(num_tokens)
        elif layer.cumulative_length > num_tokens:
            layer.__dict__.pop("mixtura_room", None)
            layer.keys, layer.values = (one.clone() for one in _first(layer, num_tokens))
            layer.cumulative_length = num_tokens
