"""Writing a checkpoint whose experts are in compressed-tensors' packed integers, and all else as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

import mixtura
from mixtura.checkpoints.applying.card import card_metadata
from mixtura.checkpoints.applying.copying import CopyRows
from mixtura.checkpoints.applying.shards import (
    OutputTensor,
    Shard,
    Sink,
    Unit,
    index_json,
    pack_shards,
    write_text,
)
from mixtura.checkpoints.applying.side_files import copy_side_files, side_files
from mixtura.checkpoints.applying.staging import Staging, Terms, check_place
from mixtura.checkpoints.applying.writing import failures_handled, write_shards
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.pack_quantized.names import NamedRows, named_rows
from mixtura.checkpoints.pack_quantized.scheme import (
    Scheme,
    check_groups,
    check_loads,
    check_plain,
    ignored_modules,
)
from mixtura.checkpoints.packed import MatrixName
from mixtura.checkpoints.rounded import RoundedExperts
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.view import LayerView
from mixtura.checkpoints.viewing.beside import require_alone
from mixtura.checkpoints.viewing.packed import PackedLayer
from mixtura.checkpoints.viewing.reader import compute_dtype
from mixtura.checkpoints.viewing.weight_files import INDEX_FILE
from mixtura.methods import create
from mixtura.report.units import format_bytes

# The parts of an expert's matrix, by layer and expert.
Codes = Callable[[int, int, MatrixName], Mapping[str, Tensor]]
_SHARD_BYTES = 5 * 10**9


@final
@dataclass(frozen=True, eq=False)
class WriteCodes(Unit):
    """Writes one matrix of one expert: its codes, its scales, its shape."""

    layer: int
    named: NamedRows
    codes: Codes
    outputs: tuple[OutputTensor, ...]
    shape: tuple[int, int]

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """The three."""
        return self.outputs

    def write(self, sink: Sink) -> None:
        """Take the rows out of the matrix as the expert has it."""
        parts = self.codes(self.layer, self.named.expert, self.named.matrix)
        packed, scales, shape = self.outputs
        sink.write(packed.name, parts["packed"][self.named.rows])
        sink.write(scales.name, parts["scales"][self.named.rows].to(scales.dtype))
        sink.write(shape.name, torch.tensor(self.shape))


@final
@dataclass(frozen=True, eq=False)
class WriteWhole(Unit):
    """Writes a matrix outside the experts, which is in fewer bits, as plain numbers."""

    view: CheckpointView
    name: str
    output: OutputTensor

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """The one tensor."""
        return (self.output,)

    def write(self, sink: Sink) -> None:
        """Decode it."""
        stored = self.view.stored[self.name]
        assert stored.decode is not None
        sink.write(self.name, stored.decode({part: self.view.tensor(part) for part in stored.parts}))


@final
@dataclass(frozen=True, slots=True)
class Planned:
    """A checkpoint to be.

    Attributes:
        view: what it is made of.
        scheme: how its experts are stored.
        units: what writes its tensors.
        ignored: modules that are not in fewer bits.
        decoded: tensors outside the experts that are in fewer bits there and plain numbers here.
    """

    view: CheckpointView
    scheme: Scheme
    units: tuple[Unit, ...]
    ignored: tuple[str, ...]
    decoded: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(unit.num_bytes for unit in self.units)


def plan_checkpoint(view: CheckpointView, scheme: Scheme, codes: Codes) -> Planned:
    """What the checkpoint of a model will hold; reads headers alone.

    Args:
        view: the model; its experts need not be stored in the scheme.
        scheme: how experts are to be stored.
        codes: gives them, when they are written.

    Raises:
        UserError: the format cannot say what the model is; names what it is.
    """
    require_alone(view.path, "the result")
    check_plain(view)
    check_loads(view)
    check_groups(view, scheme)
    plain, decoded = _outside(view)
    units: list[Unit] = [CopyRows.of(view.entries[name]) for name in plain]
    for name in decoded:
        stored, dtype = view.stored[name], getattr(torch, view.matrices[name].dtype)
        units.append(WriteWhole(view, name, OutputTensor(name, dtype, stored.shape)))
    for layer in view.layers:
        units.extend(_expert_units(view, layer, scheme, codes))
    ignored = ignored_modules(view, iter((*plain, *decoded)))
    return Planned(view, scheme, tuple(units), ignored, tuple(decoded))


def _outside(view: CheckpointView) -> tuple[list[str], list[str]]:
    """Tensors outside the experts: those that are copied, and those that are decoded."""
    inside = {
        name
        for layer in view.layers
        for names in (layer.fused_tensor_names(), *map(layer.expert_tensor_names, range(layer.num_experts)))
        for name in names
    }
    decoded = sorted(view.matrices)
    inside |= {part for name in decoded for part in view.stored[name].parts}
    return sorted(name for name in view.entries if name not in inside), decoded


def _expert_units(view: CheckpointView, layer: LayerView, scheme: Scheme, codes: Codes) -> Iterator[Unit]:
    quantizer = create("quantizers", scheme.action(0, 0).quantizer, **scheme.settings)
    widths = {"up": layer.shape.d_model, "down": layer.shape.d_expert}
    samples = {matrix: quantizer.encode(torch.zeros(1, width)).tensors for matrix, width in widths.items()}
    # transformers gives experts the dtype of their scales, whatever the config says.
    dtype = compute_dtype(view.config)
    for named in named_rows(view, layer):
        parts, rows = samples[named.matrix], len(named.rows)
        outputs = (
            OutputTensor(f"{named.base}.weight_packed", torch.int32, (rows, parts["packed"].shape[1])),
            OutputTensor(f"{named.base}.weight_scale", dtype, (rows, parts["scales"].shape[1])),
            OutputTensor(f"{named.base}.weight_shape", torch.int64, (2,)),
        )
        yield WriteCodes(layer.index, named, codes, outputs, (rows, widths[named.matrix]))


def codes_in(view: CheckpointView) -> Codes:
    """The codes of a checkpoint of the mixtura format that has them."""
    layers = {layer.index: layer for layer in view.layers}

    def codes(layer: int, expert: int, matrix: MatrixName) -> Mapping[str, Tensor]:
        owner = layers[layer]
        assert isinstance(owner, PackedLayer)
        packed = owner.packed_expert(expert)
        return (packed.up if matrix == "up" else packed.down).tensors

    return codes


def codes_of(kept: RoundedExperts, scheme: Scheme) -> Codes:
    """The codes of experts that were rounded by the scheme and kept."""

    def codes(layer: int, expert: int, matrix: MatrixName) -> Mapping[str, Tensor]:
        found = kept.matrix(scheme.action(layer, expert), matrix)
        assert found is not None
        return found.tensors

    return codes


def write_checkpoint(planned: Planned, out: Path, *, name: str, source_name: str, told: str = "") -> Path:
    """Write the checkpoint, whole or not at all; stopped work goes on with the same call.

    Args:
        planned: what to write.
        out: the new directory.
        name: what its card calls it.
        source_name: what its card calls the source.
        told: a sentence for the card on what was lost.

    Raises:
        OutputError: it exists, cannot be written, or was begun with other settings.
        CheckpointError: a tensor that is read is damaged.
    """
    check_place(out, planned.view.path)
    shards = pack_shards(planned.units, _SHARD_BYTES)
    staging = Staging(out, _terms(planned, (source_name, name)))
    staging.check_terms()
    with staging:
        if not staging.was_published:
            with failures_handled(staging):
                small = side_files(planned.view.path)
                room = sum((planned.view.path / path).stat().st_size for path in small)
                write_shards(staging, shards, room, progress=False, workers=1)
                copy_side_files(planned.view.path, small, staging.model)
                _write_own_files(staging.model, planned, shards, card(planned, name, source_name, told))
        return staging.publish()


def _terms(planned: Planned, names: tuple[str, str]) -> Terms:
    return Terms(
        plan=sha256(json.dumps(planned.scheme.settings, sort_keys=True).encode()).hexdigest(),
        source=checkpoint_digest(planned.view.path),
        source_name=names[0],
        name=names[1],
        shard_bytes=_SHARD_BYTES,
        threads=torch.get_num_threads(),
        mixtura=mixtura.__version__,
    )


def _write_own_files(folder: Path, planned: Planned, shards: tuple[Shard, ...], text: str) -> None:
    raw: dict[str, Any] = dict(planned.view.raw_config)
    raw.setdefault("dtype", str(compute_dtype(planned.view.config)).removeprefix("torch."))
    raw["quantization_config"] = planned.scheme.config(planned.ignored)
    write_text(folder / "config.json", json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
    if len(shards) > 1:
        write_text(folder / INDEX_FILE, index_json(shards))
    write_text(folder / "README.md", text)


def card(planned: Planned, name: str, source_name: str, told: str) -> str:
    """The model card."""
    scheme = planned.scheme
    groups = f"groups of {scheme.group_size} weights" if scheme.group_size else "rows"
    where = "transformers and vLLM" if scheme.runs_in_vllm else "transformers"
    lines = [
        "---",
        card_metadata(planned.view.path, source_name, library="transformers"),
        "---",
        "",
        f"# {name}",
        "",
        f"Made from `{source_name}` by mixtura {mixtura.__version__}: its routed experts are integers of "
        f"{scheme.bits} bits with a scale for {groups}, in the format pack-quantized of compressed-tensors, "
        f"which {where} read. The weights take {format_bytes(planned.num_bytes)}. Nothing was trained.",
        "",
        *([told, ""] if told else []),
        "```python",
        "from transformers import AutoModelForCausalLM  # pip install compressed-tensors",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        "```",
        "",
    ]
    return "\n".join(lines)
