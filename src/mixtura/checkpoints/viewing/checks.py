"""Does a checkpoint hold what its config promises? Compared by shapes alone, before anything is read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixtura.checkpoints.viewing.formats import StoredTensor
from mixtura.checkpoints.viewing.mapping import Source
from mixtura.checkpoints.viewing.records import Site
from mixtura.errors import CheckpointError
from mixtura.types import LayerShape

# In config.json of a model written by mixtura: layers may hold fewer experts than the config says.
UNEVEN_KEY = "mixtura"


def check_present(
    path: Path,
    model: Any,
    sources: Mapping[str, Source],
    stored: Mapping[str, StoredTensor],
    per_expert: Collection[str],
) -> None:
    """Raise `CheckpointError` where a parameter is nowhere in the checkpoint or has another shape.

    The shapes of ``per_expert`` tensors are left to `checked_site`, which knows how many experts
    there are.
    """
    tied = set(model.all_tied_weights_keys)
    optional = [re.compile(item) for item in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    missing = [
        name
        for name, _ in model.named_parameters()
        if name not in sources and name not in tied and not any(item.search(name) for item in optional)
    ]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors that its config.json calls for, the first {missing[0]}; "
            "a weight file is missing or the config belongs to another model"
        )
    for name, tensor in model.state_dict().items():
        if name in sources and name not in tied and name not in per_expert:
            _check_shape(name, sources[name], stored, tuple(tensor.shape))


def checked_site(
    site: Site,
    sources: Mapping[str, Source],
    stored: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    uneven: bool,
) -> Site:
    """The layer with its number of experts as stored.

    Raises `CheckpointError` where stored shapes do not fit together, or where the number of experts
    is not the config's in a checkpoint that is not ``uneven``.
    """
    num_experts = _stored_experts(site, sources, stored)
    if num_experts != site.shape.num_experts and not uneven:
        raise CheckpointError(
            f"{site.name} stores {num_experts} experts but config.json says {site.shape.num_experts}; "
            "a weight file is missing or the config belongs to another model"
        )
    for parameter in site.layout.parameters:
        name = f"{site.name}.{parameter}"
        _check_elements(name, sources[name], stored, num_experts, shapes[name][1:])
    for name, axis in site.expert_axes.items():
        if name in sources:
            expected = list(shapes[name])
            expected[axis] += num_experts - site.shape.num_experts
            _check_shape(name, sources[name], stored, tuple(expected))
    shape = site.shape
    return replace(site, shape=LayerShape(shape.d_model, shape.d_expert, num_experts))


def _stored_experts(site: Site, sources: Mapping[str, Source], stored: Mapping[str, StoredTensor]) -> int:
    """Experts of the layer on disk. Raises `CheckpointError` where its tensors disagree."""
    counts: dict[int, str] = {}
    for parameter in site.layout.parameters:
        name = f"{site.name}.{parameter}"
        if name not in sources:
            raise CheckpointError(f"the checkpoint has nothing for {name}; a weight file is missing")
        source = sources[name]
        for pattern, parts in source.own_parts(name).items():
            count = len(parts) if "*" in pattern else stored[parts[0]].shape[0]
            counts.setdefault(count, parts[0])
    if len(counts) > 1:
        (one, first), (other, second) = list(counts.items())[:2]
        raise CheckpointError(
            f"{first} is one of {one} experts but {second} is one of {other}; a weight file is missing"
        )
    return next(iter(counts))


def _check_elements(
    name: str,
    source: Source,
    stored: Mapping[str, StoredTensor],
    num_experts: int,
    expert_shape: tuple[int, ...],
) -> None:
    """One expert's stored values must be as many as the parameter has, and alike in every expert."""
    values = 0
    for pattern, parts in source.own_parts(name).items():
        shapes = {stored[part].shape: part for part in reversed(parts)}
        if len(shapes) > 1:
            (one, first), (other, second) = list(shapes.items())[:2]
            raise CheckpointError(
                f"{first} has shape {list(one)} but {second} has {list(other)}; download the checkpoint again"
            )
        size = _size(next(iter(shapes)))
        values += size if "*" in pattern else size // num_experts
    if values != _size(expert_shape):
        raise CheckpointError(
            f"{source.names[0]} has the wrong shape {list(stored[source.names[0]].shape)}: an expert of "
            f"{name} has {_size(expert_shape)} values, the checkpoint has {values}; it is damaged or in a "
            "format that mixtura does not know: download it again or use the original checkpoint"
        )


def _check_shape(
    name: str, source: Source, stored: Mapping[str, StoredTensor], shape: tuple[int, ...]
) -> None:
    held = stored[source.names[0]].shape
    if source.converter is None and held != shape:
        raise CheckpointError(
            f"{source.names[0]} has shape {list(held)}, but {name} must have {list(shape)}; "
            "download the checkpoint again or correct config.json"
        )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
