"""Letting new tokens pass only some of a model's layers, with a cache that has no holes.

A layer that is not run hands on what it was given, and its place in the cache gets the keys and values that
the nearest layer below wrote for the same tokens, so that later tokens that do pass it find every position.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtura.checkpoints.viewing.wrappers import plain_model
from mixtura.errors import UnsupportedModelError
from mixtura.machine.releases import given_cache

AfterLayer = Callable[[int, Tensor], bool]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model's decoder.

    Raises:
        UnsupportedModelError: they are not in one list.
    """
    plain: Any = plain_model(model)
    number = int(plain.config.get_text_config(decoder=True).num_hidden_layers)
    for name, module in plain.named_modules():
        if isinstance(module, nn.ModuleList) and name.endswith("layers") and len(module) == number:
            return module
    raise UnsupportedModelError(
        f"{type(plain).__name__} does not keep its {number} layers in one list, so none can be skipped; "
        "choose another decoder"
    )


@contextmanager
def shortened(
    model: PreTrainedModel, skipped: Collection[int], after: AfterLayer | None = None
) -> Iterator[list[int]]:
    """Passes in here skip some layers, and all that follow one of which ``after`` says so.

    Yields:
        The layers that the last pass ran.
    """
    ran: list[int] = []
    if not skipped and after is None:
        yield ran
        return
    layers = decoder_layers(model)
    kept = [vars(layer).get("forward") for layer in layers]
    leaving = [False]
    for index, layer in enumerate(layers):
        layer.forward = partial(_run, layer.forward, index, frozenset(skipped), after, leaving, ran)
    try:
        yield ran
    finally:
        for layer, own in zip(layers, kept, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


def _run(
    own: Callable[..., Any],
    index: int,
    skipped: frozenset[int],
    after: AfterLayer | None,
    leaving: list[bool],
    ran: list[int],
    hidden: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if index == 0:
        leaving[0] = False
        ran.clear()
    if index in skipped or leaving[0]:
        _fill(given_cache(kwargs), ran[-1], index, hidden.shape[1])
        return hidden
    made = own(hidden, *args, **kwargs)
    ran.append(index)
    if after is not None:
        leaving[0] = after(index, made[0] if isinstance(made, tuple) else made)
    return made


def _fill(cache: Any, source: int, target: int, num_tokens: int) -> None:
    """Give a layer the keys and values that another wrote for the last tokens."""
    if cache is None:
        return
    held = cache.layers[source]
    keys, values = held.keys[..., -num_tokens:, :], held.values[..., -num_tokens:, :]
    wanted = cache.layers[target].keys
    if wanted is not None and wanted.shape[1:2] + wanted.shape[3:] != keys.shape[1:2] + keys.shape[3:]:
        raise UnsupportedModelError(
            f"layers {source} and {target} have keys of other sizes, so that one cannot stand in for the "
            "other; choose another decoder"
        )
    cache.layers[target].update(keys, values)
