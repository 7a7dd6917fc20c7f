"""Whether a pass of a decoder is one that a whole step runs: a token of each sequence, behind its cache."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mixtura.kernels.declined import Declined
from mixtura.machine.releases import CACHE_NAMES

_MOST_SEQUENCES: Final = 64
_USUAL: Final = {"attention_mask", "position_ids", "use_cache", "cache_position", *CACHE_NAMES}
_ASKED: Final = ("output_attentions", "output_hidden_states", "output_router_logits")


def is_step(ids: Any) -> bool:
    """Whether these are token ids, one of each of some sequences."""
    return type(ids) is Tensor and ids.ndim == 2 and ids.shape[1] == 1 and 0 < ids.shape[0] <= _MOST_SEQUENCES


def asked_besides(named: dict[str, Any]) -> str:
    """What a call wants but the next hidden states, or what of it keeps them from being all."""
    asked = [n for n, value in named.items() if value is not None and value is not False and n not in _USUAL]
    if named.get("use_cache") is False:
        asked.append("no cache")
    if torch.is_autocast_enabled("cpu"):
        asked.append("autocast")
    return ", ".join(asked)


def check_usual(config: Any) -> None:
    """Decline a configuration that wants more than hidden states, or attention that is not known."""
    if config._attn_implementation not in ("sdpa", "eager"):
        raise Declined(f"its attention runs by the implementation {config._attn_implementation!r}")
    if asked := [name for name in _ASKED if getattr(config, name, False)]:
        raise Declined(f"its configuration asks for {', '.join(asked)}")


def stand_behind(cached: Any, mask: Any, places: Any, ids: Tensor) -> bool:
    """Whether the tokens come right behind what the cache holds, and see all of it."""
    if type(cached) is DynamicCache:
        past = cached.get_seq_length()
        return bool(past) and _all_seen(mask, places, ids, past)
    if len(cached.lengths) != ids.shape[0] or not all(cached.lengths):
        return False
    return _is(mask, cached.mask()) and _is(places, cached.places())


def _is(given: Any, expected: Tensor) -> bool:
    fits = type(given) is Tensor and given.shape == expected.shape
    return fits and bool((given == expected).all())


def _all_seen(mask: Any, places: Any, ids: Tensor, past: int) -> bool:
    """Whether each sequence sees all of itself, and the new token stands right behind."""
    if mask is not None:
        fits = type(mask) is Tensor and mask.shape == (ids.shape[0], past + 1)
        if not fits or not bool(mask.all()):
            return False
    return places is None or (type(places) is Tensor and places.ndim == 2 and bool((places == past).all()))
