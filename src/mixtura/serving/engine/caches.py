"""Caches of keys and values of running texts: what they take, and copies of their beginnings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

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
    """What the cache of one text takes: bytes for each token it may grow to, and bytes besides."""

    token_bytes: int
    fixed_bytes: int

    def of(self, num_tokens: int) -> int:
        """Bytes of a text of so many tokens."""
        return self.fixed_bytes + self.token_bytes * num_tokens

    def tokens_in(self, num_bytes: int) -> int:
        """Tokens of one text that find room in so many bytes."""
        return max(0, (num_bytes - self.fixed_bytes) // max(self.token_bytes, 1))


@torch.no_grad()
def measured_cost(model: PreTrainedModel) -> CacheCost:
    """What texts take, from two short ones that are read.

    Layers whose room is taken once take exactly that; others grow by copies, and twice what they hold is
    counted.
    """
    held = [_held_after(model, num) for num in _PROBES]
    (exact_short, grown_short), (exact_long, grown_long) = held
    short, long = _PROBES
    growing = max(0, grown_long - grown_short) / (long - short)
    reserved = (exact_long - exact_short) / (long - short)
    still = max(0, grown_short - int(growing * short))
    fixed = 2 * still + (int(growing * _GROWING_SPARE) if growing else 0)
    return CacheCost(int(reserved + _GROWING_FACTOR * growing + 0.999), fixed)


def _held_after(model: PreTrainedModel, num: int) -> tuple[int, int]:
    """Bytes of reserved layers and of all others once so many tokens were read."""
    cache = reserved_cache(model, num)
    ids = torch.zeros(1, num, dtype=torch.int64, device=model.device)
    outputs: Any = model(input_ids=ids, use_cache=True, logits_to_keep=1, **with_cache(cache))
    made = returned_cache(outputs)
    layers = getattr(made, "layers", None)
    if layers is None:
        return 0, _num_bytes([made])
    exact = [layer for layer in layers if isinstance(layer, ReservedLayer)]
    rest = [layer for layer in layers if not isinstance(layer, ReservedLayer)]
    return sum(layer.num_bytes for layer in exact), _num_bytes(rest)


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
