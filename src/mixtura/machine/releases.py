"""What differs between the releases of transformers that mixtura runs on; no other part asks for it.

Nothing here compares version numbers: what a release has is found in its own classes, so a release that
comes later is read the same way. So far that is three things. The cache of keys and values, which models take
and their results hold, is ``past_key_values`` up to 5.23, and ``cache`` from 5.24 on, where the older name
still works but is announced to go. Computing layers again in the backward pass instead of keeping what they
computed is ``gradient_checkpointing`` in 5.20, and ``activation_checkpointing`` in 5.23. And routers return
logits, weights and choices, but in 5.20 some families' return choices and weights, then logits or nothing.

That checkpointed layers are computed again inside or outside their hooks, that an attention hands its cache
the call's arguments: such differences need no name, because the code that meets them is right for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar

import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from mixtura.errors import UnsupportedModelError

_KNOWN: Final = ("cache", "past_key_values")

# The name under which this release's models take a cache and their results hold it.
CACHE: Final[str] = next(
    name for name in _KNOWN if name in {field.name for field in fields(BaseModelOutputWithPast)}
)
# Every name under which a caller may hand one over, this release's first. A name that only a later release
# has may mean something else in this one.
CACHE_NAMES: Final[tuple[str, ...]] = _KNOWN[_KNOWN.index(CACHE) :]

# What computing layers again is called: models have ``<name>_enable``, training ``<name>`` and
# ``<name>_kwargs``.
CHECKPOINTING: Final[str] = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(PreTrainedModel, f"{name}_enable")
)

P = ParamSpec("P")
R = TypeVar("R")


def with_cache(cache: Any) -> dict[str, Any]:
    """The argument that hands a cache to a model, its layers or its results; none for None.

    >>> list(with_cache("keys and values")) == [CACHE], with_cache(None)
    (True, {})
    """
    return {} if cache is None else {CACHE: cache}


def given_cache(named: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model or a layer, or None.

    >>> given_cache({"use_cache": True, CACHE: "keys and values"})
    'keys and values'
    """
    return next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)


def returned_cache(outputs: Any) -> Any:
    """The cache in what a model returned, or None."""
    return getattr(outputs, CACHE, None)


def takes_cache(forward: Callable[P, R]) -> Callable[P, R]:
    """Let a ``forward`` with an argument ``past_key_values`` be called by this release's name of it too."""
    if CACHE == "past_key_values":
        return forward

    @wraps(forward)
    def renamed(*args: P.args, **kwargs: P.kwargs) -> R:
        if CACHE in kwargs:
            given = kwargs.pop(CACHE)
            kwargs.setdefault("past_key_values", given)
        return forward(*args, **kwargs)

    return renamed


def checkpoint_layers(model: Any, **settings: Any) -> None:
    """Let a model of transformers compute its layers again in the backward pass.

    ``settings`` are those of ``torch.utils.checkpoint``, such as ``use_reentrant``.
    """
    getattr(model, f"{CHECKPOINTING}_enable")(**{f"{CHECKPOINTING}_kwargs": settings} if settings else {})


def checkpointing_arguments(wanted: bool, **settings: Any) -> dict[str, Any]:
    """The same as arguments of transformers' ``TrainingArguments``.

    >>> list(checkpointing_arguments(True)) == [CHECKPOINTING]
    True
    """
    return {CHECKPOINTING: wanted, **({f"{CHECKPOINTING}_kwargs": settings} if settings else {})}


def logits_weights_choices(output: Any) -> tuple[Tensor | None, Tensor, Tensor]:
    """What a family's router returned, in one order; None for logits that it keeps to itself.

    Raises:
        UnsupportedModelError: it returns logits alone and its block chooses, as jamba's does in 5.20.
    """
    if not isinstance(output, tuple) or len(output) < 2:
        raise UnsupportedModelError(
            "a router of this family returns no choices in the installed transformers "
            f"{transformers.__version__}, so they can be neither changed nor recorded; use a newer release"
        )
    if _begins_with_choices(output):
        choices, weights, *rest = output
        return (rest[0] if rest else None), weights, choices
    logits, weights, choices = output[:3]
    return logits, weights, choices


def in_order_of(output: Sequence[Any], logits: Tensor, weights: Tensor, choices: Tensor) -> tuple[Any, ...]:
    """Other logits, weights and choices in the order in which a family's router returned its own."""
    if _begins_with_choices(output):
        return (choices, weights, logits)[: len(output)] + tuple(output[3:])
    return (logits, weights, choices, *output[3:])


def _begins_with_choices(output: Sequence[Any]) -> bool:
    return isinstance(output[0], Tensor) and not output[0].is_floating_point()
