"""A checkpoint of the mixtura format as layers of a router and experts, without loading it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import Any, final

from torch import Tensor

from mixtura.checkpoints.contents import Contents, read_experts_file
from mixtura.checkpoints.nesting import Widths, check_named, layer_at
from mixtura.checkpoints.packed import (
    EXPERTS_FILE,
    QUANT_METHOD,
    LayerRecord,
    MatrixRecord,
    PackedExpert,
    PackedMatrix,
    matrix_part,
    read_expert,
)
from mixtura.checkpoints.viewing.base import LayerView
from mixtura.checkpoints.viewing.checks import UNEVEN_KEY, check_present, checked_site
from mixtura.checkpoints.viewing.disk import DiskLayer
from mixtura.checkpoints.viewing.formats import StoredTensor
from mixtura.checkpoints.viewing.headers import TensorFiles
from mixtura.checkpoints.viewing.mapping import Source
from mixtura.checkpoints.viewing.meta import build_from_config
from mixtura.checkpoints.viewing.opening import OpenedFiles, open_files
from mixtura.checkpoints.viewing.reader import CheckpointReader
from mixtura.checkpoints.viewing.records import Site
from mixtura.checkpoints.viewing.sites import find_sites
from mixtura.checkpoints.viewing.stored import StoredView
from mixtura.errors import CheckpointError
from mixtura.kernels import ExpertTensors
from mixtura.types import LayerShape

# What the format adds to config.json beside its quantization_config.
_OWN_KEYS = (UNEVEN_KEY, "transformers_weights")


@final
class PackedLayer(LayerView):
    """One MoE layer whose experts are stored in fewer bits. Every call reads from disk."""

    def __init__(self, site: Site, reader: CheckpointReader, files: TensorFiles, record: LayerRecord) -> None:
        super().__init__(site)
        self._reader = reader
        self._files = files
        self.record = record

    def tensor(self, name: str) -> Tensor:
        """One parameter under the model's own name. Raises `LookupError` for a name it has not."""
        return self._reader.parameter(name)

    def native_expert(self, expert: int) -> ExpertTensors:
        """Expert ``expert`` decoded, in its family's own layout and its source's dtype."""
        self._check_expert(expert)
        assert self.record.experts is not None
        dtype = self.record.experts[expert].up.torch_dtype
        return self.packed_expert(expert).native(dtype, transposed=self.layout.transposed)

    def packed_expert(self, expert: int) -> PackedExpert:
        """Expert ``expert`` as it is stored."""
        self._check_expert(expert)
        return read_expert(self.record, expert, self._files.read)

    def expert_tensor_names(self, expert: int) -> tuple[str, ...]:
        """The names on disk that hold this expert, alone or with those that it was merged with."""
        self._check_expert(expert)
        return self.record.tensor_names(expert)

    def fused_tensor_names(self) -> tuple[str, ...]:
        """The names on disk that hold all experts of the layer: none."""
        return ()

    @property
    def expert_num_bytes(self) -> int:
        """Bytes one expert takes on disk, the mean over the layer."""
        names = (name for expert in self.record.stored for name in self.expert_tensor_names(expert))
        return sum(self._files.entries[name].num_bytes for name in names) // max(self.num_experts, 1)


@final
class PackedView(StoredView):
    """A directory that `mixtura.checkpoints.apply` wrote in mixtura's format, opened from its headers.

    Layers that the plan left whole are `DiskLayer`, the others `PackedLayer`. ``bits`` says at how many
    experts are read that hold several widths in one copy: for all of them, or by decoder layer and
    expert; by default at the widest.

    Raises `CheckpointError` for a directory that is missing, incomplete or damaged, and `UserError` for
    bits that are not there.
    """

    def __init__(self, path: str | PathLike[str], *, bits: Widths | None = None) -> None:
        opened = open_files(path, restore=_restored)
        opened.config.name_or_path = str(opened.path)
        meta = build_from_config(opened.config)
        contents = read_experts_file(opened.path)
        packed = _packed_names(opened, contents)
        check_named(contents.layers, bits)
        self.records = {record.name: layer_at(record, bits) for record in contents.layers}
        self.matrices = contents.matrices
        super().__init__(
            opened,
            meta,
            {n: entry for n, entry in opened.entries.items() if n not in packed},
            {name: _stored_matrix(opened, name, record) for name, record in contents.matrices.items()},
        )
        self._check_present()
        self.layers  # noqa: B018  # finding the layers checks their shapes: say so on opening

    @cached_property
    def layers(self) -> tuple[DiskLayer | PackedLayer, ...]:
        """The MoE layers, in order."""
        found = find_sites(self._meta, dict(self._probe.expert_axes))
        return tuple(self._layer(site) for site in found)

    def _layer(self, site: Site) -> DiskLayer | PackedLayer:
        if site.name not in self.records:
            raise CheckpointError(
                f"{self.path / EXPERTS_FILE} says nothing of {site.name}; write the model again"
            )
        record = self.records[site.name]
        if record.experts is None:
            return DiskLayer(checked_site(site, self.sources, self.stored, self._shapes, True), self._reader)
        shape = LayerShape(site.shape.d_model, site.shape.d_expert, record.num_experts)
        return PackedLayer(replace(site, shape=shape), self._reader, self._files, record)

    @cached_property
    def stored_dtype(self) -> str:
        """How most bytes of the experts are stored: ``round_to_nearest``, ``bfloat16``, ..."""
        sizes: Counter[str] = Counter()
        for layer in self.layers:
            if isinstance(layer, DiskLayer):
                for parameter in layer.expert_parameters:
                    for name in self.sources[parameter].names:
                        sizes[self.stored[name].kind] += self.stored[name].num_bytes
                continue
            records = layer.record.experts or ()
            for number in layer.record.stored if records else ():
                up = records[number].up
                kind = up.quantizer or up.meta.get("stored") or up.dtype
                names = layer.expert_tensor_names(number)
                sizes[str(kind)] += sum(self.entries[name].num_bytes for name in names)
        return sizes.most_common(1)[0][0]

    def _check_present(self) -> None:
        axes = self._probe.expert_axes
        inside = {
            name: Source((name,))
            for record in self.records.values()
            if record.experts is not None
            for name in self._shapes
            if name.startswith(f"{record.name}.") and name in axes
        }
        sources = {**inside, **self.sources}
        check_present(self.path, self._meta, sources, self.stored, {*axes, *inside})


def _packed_names(opened: OpenedFiles, contents: Contents) -> set[str]:
    """On-disk names of all that is in fewer bits. Raises `CheckpointError` where one is missing."""
    names = {matrix_part(name, part) for name, record in contents.matrices.items() for part in record.parts}
    for layer in contents.layers:
        for number in range(len(layer.experts or ())):
            names.update(layer.tensor_names(number))
    missing = sorted(names - opened.entries.keys())
    if missing:
        raise CheckpointError(
            f"{opened.path} lacks {len(missing)} tensors that its {EXPERTS_FILE} names, the first "
            f"{missing[0]}; a weight file is missing, write the model again"
        )
    return names


def _stored_matrix(opened: OpenedFiles, name: str, record: MatrixRecord) -> StoredTensor:
    """A matrix outside the experts as one tensor, decoded when it is read."""
    parts = {matrix_part(name, part): part for part in record.parts}

    def decode(tensors: Mapping[str, Tensor]) -> Tensor:
        found = {part: tensors[stored] for stored, part in parts.items()}
        return PackedMatrix(record, found).dense(record.torch_dtype)

    num_bytes = sum(opened.entries[part].num_bytes for part in parts)
    kind = str(record.quantizer)
    return StoredTensor(name, tuple(parts), (record.rows, record.cols), kind, num_bytes, decode=decode)


def _restored(raw: dict[str, Any]) -> dict[str, Any]:
    """The config of the checkpoint's source: what marks the mixtura format taken off."""
    restored = {key: value for key, value in raw.items() if key not in _OWN_KEYS}
    own = restored.pop("quantization_config", None) or {}
    source = own.get("source") if own.get("quant_method") == QUANT_METHOD else own
    if source:
        restored["quantization_config"] = source
    return restored
