"""A checkpoint on disk as layers of a router and experts, without loading it.

Opening reads ``config.json`` and the headers of the safetensors files and builds the model's shape on
the meta device. Reading an expert reads the bytes of that expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from mixtura.checkpoints.viewing.base import LayerView, ModelView
from mixtura.checkpoints.viewing.beyond import beside_experts, layers_beyond, without_prediction
from mixtura.checkpoints.viewing.checks import UNEVEN_KEY, check_present, checked_site
from mixtura.checkpoints.viewing.droppable import Drops, check_drops
from mixtura.checkpoints.viewing.edits import TensorEdit, pruned_config, renumbered, tensor_edits
from mixtura.checkpoints.viewing.formats import Decoder, StoredTensor, stored_tensors
from mixtura.checkpoints.viewing.headers import TensorFiles
from mixtura.checkpoints.viewing.mapping import EXPERT_NUMBER, ShapeModel, Source, add_tied, map_sources
from mixtura.checkpoints.viewing.meta import build_from_config, named_tensors
from mixtura.checkpoints.viewing.opening import OpenedFiles, no_collection, open_files
from mixtura.checkpoints.viewing.probe import CountField, Probe, probe
from mixtura.checkpoints.viewing.quantization import check_readable, fp8_block, refuse_by_names, stated_format
from mixtura.checkpoints.viewing.records import Site
from mixtura.checkpoints.viewing.refusals import refuse_without_experts
from mixtura.checkpoints.viewing.sites import find_sites
from mixtura.checkpoints.viewing.wrappers import experts_modules
from mixtura.errors import suggest
from mixtura.kernels import ExpertTensors

# What a model can compute in: PyTorch lets no narrower dtype be the default of a model's tensors.
_COMPUTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@final
class CheckpointReader:
    """Reads parameters of a model from wherever a checkpoint keeps them."""

    def __init__(
        self,
        decoder: Decoder,
        stored: Mapping[str, StoredTensor],
        sources: Mapping[str, Source],
        shapes: Mapping[str, tuple[int, ...]],
        config: Any,
    ) -> None:
        self.decoder = decoder
        self.stored = stored
        self.sources = sources
        self._shapes = shapes
        self._config = config

    def parameter(self, name: str) -> Tensor:
        """One whole parameter under the model's own name. Raises `LookupError` for a name it has not."""
        source = self.source(name)
        tensors = {
            pattern: [self.decoder.read(self.stored[part]) for part in parts]
            for pattern, parts in source.parts.items()
        }
        return source.convert(tensors, ShapeModel(self._shapes.__getitem__), self._config)[name]

    def expert_slice(self, name: str, expert: int, num_experts: int) -> Tensor:
        """Entry ``expert`` of a parameter that stacks experts, reading nothing of the others."""
        source = self.source(name)
        tensors = {
            pattern: [
                self.decoder.read(self.stored[part], None if "*" in pattern else slice(expert, expert + 1))
                for part in parts
            ]
            for pattern, parts in source.expert_names(expert, num_experts).items()
        }
        one = ShapeModel(lambda parameter: (1, *self._shapes[parameter][1:]))
        return source.convert(tensors, one, self._config)[name][0]

    def source(self, name: str) -> Source:
        """Where a parameter comes from. Raises `LookupError` for a name the model has not."""
        try:
            return self.sources[name]
        except KeyError:
            raise LookupError(f"the checkpoint has nothing for {name!r}") from None


@final
class DiskLayer(LayerView):
    """One MoE layer of a checkpoint. Every call reads from disk; nothing is kept."""

    def __init__(self, site: Site, reader: CheckpointReader) -> None:
        super().__init__(site)
        self._reader = reader

    def tensor(self, name: str) -> Tensor:
        """One parameter under the model's own name. Raises `LookupError` for a name it has not."""
        return self._reader.parameter(name)

    def native_expert(self, expert: int) -> ExpertTensors:
        """Expert ``expert`` in its family's own layout; FP8 and MXFP4 are decoded."""
        self._check_expert(expert)
        read = self._reader.expert_slice
        up, down, *biases = (read(name, expert, self.num_experts) for name in self.expert_parameters)
        return ExpertTensors(up, down, *(biases or (None, None)))

    def expert_tensor_names(self, expert: int) -> tuple[str, ...]:
        """The names on disk that hold this expert alone; empty where experts are stored fused."""
        self._check_expert(expert)
        names: dict[str, None] = {}
        for parameter in self.expert_parameters:
            for pattern, parts in self._reader.source(parameter).own_parts(parameter).items():
                if "*" in pattern:
                    names.update(dict.fromkeys(self._reader.stored[parts[expert]].parts))
        return tuple(names)

    def fused_tensor_names(self) -> tuple[str, ...]:
        """The names on disk that hold all experts of the layer, one after the other along axis 0."""
        names: dict[str, None] = {}
        for parameter in self.expert_parameters:
            for pattern, parts in self._reader.source(parameter).parts.items():
                if "*" not in pattern:
                    for part in parts:
                        names.update(dict.fromkeys(self._reader.stored[part].parts))
        return tuple(names)

    @property
    def expert_num_bytes(self) -> int:
        """Bytes one expert takes on disk, scales included."""
        total = 0
        for parameter in self.expert_parameters:
            source = self._reader.source(parameter)
            for parts in source.own_parts(parameter).values():
                total += sum(self._reader.stored[part].num_bytes for part in parts)
        return total // self.num_experts


@final
class DiskView(ModelView):
    """A checkpoint directory, opened from its headers alone.

    Raises `CheckpointError` for one that is missing, incomplete or damaged, and
    `UnsupportedModelError` for a dense model, an unknown family or a format that is not read.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        opened = open_files(path)
        self.path: Path = opened.path
        self.files: tuple[Path, ...] = opened.files
        self.raw_config = opened.raw_config
        self.entries = opened.entries
        self._config = opened.config
        self._meta = build_from_config(self._config)
        if next(experts_modules(self._meta), None) is None:
            refuse_without_experts(self.model_type)
        refuse_by_names(opened.entries, self._meta)
        with no_collection():
            self.stored = stored_tensors(opened.entries)
            self.sources, self.unused_names = map_sources(self._meta, self.stored)
        add_tied(self.sources, self._meta)
        self._files = TensorFiles(opened.entries)
        self._shapes, self._reader = make_reader(opened, self._meta, self.stored, self.sources, self._files)
        check_present(self.path, self._meta, self.sources, self.stored, self._probe.expert_axes.keys())
        self.layers  # noqa: B018  # finding the layers checks their shapes: say so on opening

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self._config

    @property
    def meta_model(self) -> nn.Module:
        """The model on the meta device: every shape, no weights. Do not change it."""
        return self._meta

    @cached_property
    def _probe(self) -> Probe:
        return probe(self._meta, self._config)

    @cached_property
    def layers(self) -> tuple[DiskLayer, ...]:
        """The MoE layers, in order."""
        uneven = UNEVEN_KEY in self.raw_config
        found = find_sites(self._meta, dict(self._probe.expert_axes))
        sites = [checked_site(site, self.sources, self.stored, self._shapes, uneven) for site in found]
        return tuple(DiskLayer(site, self._reader) for site in sites)

    @property
    def count_fields(self) -> Mapping[str, CountField]:
        """For each stack of MoE layers, the config field that sets its number of experts."""
        return self._probe.fields

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Every name stored on disk, parts of scaled formats included."""
        return tuple(self.entries)

    def tensor(self, name: str) -> Tensor:
        """One tensor by its name on disk, as it is stored. Raises `LookupError` for an unknown name."""
        if name not in self.entries:
            raise LookupError(f"{self.path} holds no tensor {name!r}; {suggest(name, self.entries)}")
        return self._files.read(name)

    def edits(self, drops: Drops) -> dict[str, TensorEdit]:
        """What dropping experts does to each stored tensor; those not named stay as they are.

        Raises `UserError` where experts cannot go (see `mixtura.checkpoints.viewing.droppable.check_drops`).
        """
        kept = check_drops(self.layers, drops)
        sites = [layer.site for layer in self.layers]
        edits = tensor_edits(sites, self.sources, self.stored, kept, self._config)
        for layer in self.layers:
            for name, expert in self.beside_experts(layer).items():
                edits[name] = TensorEdit(
                    renumbered(name, layer.num_experts, kept[layer.index])
                    if expert in kept[layer.index]
                    else None
                )
        if any(len(kept[layer.index]) < layer.num_experts for layer in self.layers):
            edits.update(
                {name: TensorEdit(None) for name in self.unused_names if name.startswith(self.layers_beyond)}
            )
        return edits

    @cached_property
    def layers_beyond(self) -> tuple[str, ...]:
        """The beginnings of names of layers with as many experts that transformers does not load.

        They go when experts go: the config has one number for them and for the layers that were watched.
        """
        used = {
            part
            for source in self.sources.values()
            for name in source.names
            for part in self.stored[name].parts
        }
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        return layers_beyond(self.unused_names, used, shapes, {layer.num_experts for layer in self.layers})

    def beside_experts(self, layer: DiskLayer) -> dict[str, int]:
        """What transformers does not load of single experts of a layer, and the expert of each name."""
        own = layer.expert_tensor_names(0)
        number = min((int(match.group()) for name in own if (match := EXPERT_NUMBER.search(name))), default=0)
        found = beside_experts(self.unused_names, own).items()
        return {name: n - number for name, n in found if number <= n < number + layer.num_experts}

    def pruned_config(self, drops: Drops) -> dict[str, Any]:
        """``config.json`` of the checkpoint without these experts.

        Raises `UserError` where experts cannot go or layers would keep different numbers of them.
        """
        kept = check_drops(self.layers, drops)
        sites = [layer.site for layer in self.layers]
        changed = pruned_config(self.raw_config, self._config, sites, self.count_fields, kept)
        if self.layers_beyond and any(len(kept[layer.index]) < layer.num_experts for layer in self.layers):
            without_prediction(changed)
        return changed

    def parameter(self, name: str) -> Tensor:
        """One parameter by the model's own name, converted and decoded."""
        return self._reader.parameter(name)

    @cached_property
    def stored_dtype(self) -> str:
        """How most bytes of the experts are stored: ``bfloat16``, ``float32``, ``fp8``, ``mxfp4``, ..."""
        sizes: Counter[str] = Counter()
        for layer in self.layers:
            for parameter in layer.expert_parameters:
                for name in self.sources[parameter].names:
                    sizes[self.stored[name].kind] += self.stored[name].num_bytes
        return sizes.most_common(1)[0][0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(entry.num_bytes for entry in self.entries.values())


def make_reader(
    opened: OpenedFiles,
    meta: nn.Module,
    stored: Mapping[str, StoredTensor],
    sources: Mapping[str, Source],
    files: TensorFiles,
) -> tuple[dict[str, tuple[int, ...]], CheckpointReader]:
    """The shapes of a model's tensors, and what reads them; the config is given a dtype if it has none.

    Raises `CheckpointError` or `UnsupportedModelError` where one that is needed cannot be decoded.
    """
    if stated_dtype(opened.config) is None:
        opened.config.dtype = inferred_dtype(stored, files, opened.stated_dtype)
    decoder = Decoder(files, compute_dtype(opened.config), fp8_block(opened.raw_config))
    tensors = named_tensors(meta)
    floating = {name: tensor.is_floating_point() for name, tensor in tensors.items()}
    check_readable(decoder, sources, stored, floating, stated_format(opened.path, opened.raw_config))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return shapes, CheckpointReader(decoder, stored, sources, shapes, opened.config)


def compute_dtype(config: Any) -> torch.dtype:
    """What a view's model computes in and scaled formats are decoded to."""
    dtype = stated_dtype(config)
    assert dtype is not None, "a view gives its config the dtype of the weights where the file names none"
    return dtype


def stated_dtype(config: Any) -> torch.dtype | None:
    """The dtype that a config names; `None` where it names none that a model could compute in."""
    for owner in (config, config.get_text_config()):
        if isinstance(owner.dtype, torch.dtype) and owner.dtype in _COMPUTED:
            return owner.dtype
    return None


def inferred_dtype(
    stored: Mapping[str, StoredTensor], files: TensorFiles, named: str | None = None
) -> torch.dtype:
    """The dtype of a checkpoint whose config names none, by transformers' rule.

    That is what the index of the files names, else that of the first floating-point tensor, by name, of the
    first file. Scales do not count; bfloat16 where all else is in a scaled format.
    """
    by_index = next(
        (dtype for dtype in _COMPUTED if str(dtype).endswith(f".{named}") or str(dtype) == named), None
    )
    if by_index is not None:
        return by_index
    plain = (
        (files.entries[part].file, part)
        for tensor in stored.values()
        if len(tensor.parts) == 1
        for part in tensor.parts
    )
    order = sorted(plain)
    dtypes = (files.entries[name].dtype for _, name in order)
    return next((dtype for dtype in dtypes if dtype in _COMPUTED), torch.bfloat16)
