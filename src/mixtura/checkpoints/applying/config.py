"""``config.json`` of the new checkpoint: the source's, with the number of experts changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from mixtura.checkpoints.applying.blueprint import Blueprint, is_even
from mixtura.checkpoints.packed import QUANT_METHOD
from mixtura.checkpoints.viewing.beyond import without_prediction
from mixtura.checkpoints.viewing.checks import UNEVEN_KEY
from mixtura.checkpoints.viewing.disk import DiskView
from mixtura.checkpoints.viewing.probe import CountField
from mixtura.checkpoints.viewing.reader import compute_dtype

# transformers reads weights from the file of this name and stops with its text where it is none.
_REFUSAL_KEY = "transformers_weights"
_REFUSAL = (
    "this model is in the mixtura format: load its directory with mixtura.load, and give pipeline() that "
    "model and its tokenizer in place of the directory"
)

_DTYPE_KEYS = ("dtype", "torch_dtype")


def config_json(view: DiskView, made: Blueprint) -> str:
    """The new ``config.json`` as text.

    A checkpoint of the mixtura format gets a ``quantization_config`` of its own (the source's goes
    beneath it, as it still holds for tensors outside the experts) and a key that makes plain
    transformers refuse it in words instead of loading it without its experts.
    """
    raw = copy.deepcopy(view.raw_config)
    if not any(key in part for part in (raw, raw.get("text_config") or {}) for key in _DTYPE_KEYS):
        # Of the weights that are written, others may be the first, from which the dtype would be inferred.
        raw["dtype"] = str(compute_dtype(view.config)).removeprefix("torch.")
    if made.left_out:
        without_prediction(raw)
    counts = {layer.index: layer.num_experts for layer in made.contents.layers}
    if is_even(view, {layer.index: layer.kept for layer in made.contents.layers}):
        for layer in view.layers:
            if counts[layer.index] != layer.num_experts:
                _set_count(raw, view.config, view.count_fields[layer.stack], counts[layer.index])
    else:
        raw[UNEVEN_KEY] = {"num_experts": {str(index): count for index, count in sorted(counts.items())}}
    if made.width is not None:
        _set_count(raw, view.config, made.width.field, made.width.d_expert)
    if not made.ordinary:
        own: dict[str, Any] = {"quant_method": QUANT_METHOD, "version": made.contents.version}
        if raw.get("quantization_config") is not None:
            own["source"] = raw["quantization_config"]
        raw["quantization_config"] = own
        raw[_REFUSAL_KEY] = _REFUSAL
    return json.dumps(raw, indent=2, ensure_ascii=False) + "\n"


def _set_count(raw: dict[str, Any], config: Any, field: CountField, count: int) -> None:
    """Write a number, of experts or neurons, where the file has it, under any name the family allows."""
    owner = raw
    for part in field.path[:-1]:
        config = getattr(config, part)
        owner = owner.setdefault(part, {})
    name = field.path[-1]
    aliases: Mapping[str, str] = getattr(config, "attribute_map", {})
    names = {name, *(alias for alias, real in aliases.items() if real == name)}
    if name in aliases:
        names.add(aliases[name])
    for key in (names & set(owner)) or {name}:
        held = owner.get(key, getattr(config, name))
        owner[key] = [count] * len(held) if isinstance(held, list) else count
