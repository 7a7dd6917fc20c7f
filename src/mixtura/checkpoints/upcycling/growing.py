"""A dense checkpoint with more layers: old ones byte for byte, new ones that compute nothing yet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, final

import torch

import mixtura
from mixtura.checkpoints.applying.copying import CopyRows
from mixtura.checkpoints.applying.shards import (
    OutputTensor,
    Sink,
    Unit,
    pack_shards,
    write_text,
)
from mixtura.checkpoints.applying.staging import Staging, Terms, check_place
from mixtura.checkpoints.dense.view import DenseView
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.packed import PLAN_FILE
from mixtura.checkpoints.upcycling.streaming import stream
from mixtura.checkpoints.viewing.headers import TensorEntry
from mixtura.errors import MixturaError, UserError
from mixtura.types import Plan
from mixtura.types.upcycling import Grow

_SHARD_BYTES = 5 * 10**9
_LAYERS = "model.layers."
# What writes into the residual stream, by the names of all families that are read.
_WRITES = ("self_attn.o_proj.", "mlp.down_proj.")


def grow(plan: Plan, source: Path, out: Path, *, progress: bool = True) -> tuple[int, ...]:
    """Write the deeper model to ``out``; says which of its layers are new.

    Stopped work is continued by the same call, to the same bytes.

    Raises:
        UserError: the plan names a layer that is not there.
        OutputError: ``out`` exists or cannot be written.
    """
    check_place(out, source)
    view = DenseView(source)
    order = _order(plan, view.shape.num_layers)
    shards = pack_shards(_units(view, order), _SHARD_BYTES)
    staging = Staging(out, _terms(plan, source, out))

    def write_own_files(folder: Path) -> None:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        write_text(folder / "config.json", json.dumps(_deeper(config, order), indent=2))
        write_text(folder / PLAN_FILE, plan.to_json())
        _require_opens(folder)

    stream(staging, source, shards, write_own_files, progress=progress)
    return tuple(number for number, layer in enumerate(order) if isinstance(layer, Grow))


def _order(plan: Plan, num_layers: int) -> list[int | Grow]:
    """The new model's layers: numbers of old ones, and what makes new ones."""
    new = [action for action in plan.actions if isinstance(action, Grow)]
    for action in new:
        for number in (action.after, action.copy_of):
            if not 0 <= number < num_layers:
                raise UserError(f"the plan names layer {number}, and the model has 0 to {num_layers - 1}")
    order: list[int | Grow] = []
    for layer in range(num_layers):
        order += [layer, *(action for action in new if action.after == layer)]
    return order


def _units(view: DenseView, order: Sequence[int | Grow]) -> list[Unit]:
    by_layer: dict[int, dict[str, TensorEntry]] = {}
    units: list[Unit] = []
    for name, entry in view.entries.items():
        if name.startswith(_LAYERS):
            number, _, own = name.removeprefix(_LAYERS).partition(".")
            by_layer.setdefault(int(number), {})[own] = entry
        else:
            units.append(CopyRows.of(entry))
    for place, layer in enumerate(order):
        copied = layer.copy_of if isinstance(layer, Grow) else layer
        for own, entry in by_layer[copied].items():
            name = f"{_LAYERS}{place}.{own}"
            units.append(
                _new(name, own, entry, layer) if isinstance(layer, Grow) else CopyRows.of(entry, name=name)
            )
    return units


def _new(name: str, own: str, entry: TensorEntry, action: Grow) -> Unit:
    output = OutputTensor(name, entry.dtype, entry.shape)
    if own.startswith(_WRITES):
        return _Drawn(output, 0.0, 0)
    if action.std and len(entry.shape) > 1:
        told = sha256(f"{action.seed} {name}".encode()).digest()
        return _Drawn(output, action.std, int.from_bytes(told[:7], "big"))
    return CopyRows.of(entry, name=name)


@final
@dataclass(frozen=True, eq=False)
class _Drawn(Unit):
    """Writes zeros, or normal numbers of a deviation."""

    output: OutputTensor
    std: float
    seed: int

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """The one tensor."""
        return (self.output,)

    def write(self, sink: Sink) -> None:
        """Draw and write it."""
        values = torch.zeros(self.output.shape)
        if self.std:
            values.normal_(0.0, self.std, generator=torch.Generator().manual_seed(self.seed))
        sink.write(self.output.name, values.to(self.output.dtype))


def _deeper(config: Mapping[str, Any], order: Sequence[int | Grow]) -> dict[str, Any]:
    """The config with more layers; what it says layer by layer goes with the layers."""
    made = {**config, "num_hidden_layers": len(order)}
    if config.get("layer_types") is not None:
        copied = [layer.copy_of if isinstance(layer, Grow) else layer for layer in order]
        made["layer_types"] = [config["layer_types"][number] for number in copied]
    return made


def _terms(plan: Plan, source: Path, out: Path) -> Terms:
    return Terms(
        plan=sha256(plan.to_json().encode()).hexdigest(),
        source=checkpoint_digest(source),
        source_name=source.resolve().name,
        name=out.absolute().name,
        shard_bytes=_SHARD_BYTES,
        threads=torch.get_num_threads(),
        mixtura=mixtura.__version__,
    )


def _require_opens(folder: Path) -> None:
    try:
        DenseView(folder)
    except UserError as error:
        raise MixturaError(f"what was written to {folder} does not open: {error}") from error
