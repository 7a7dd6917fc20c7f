"""A checkpoint on disk as layers of a router and experts, without loading it.

Opening reads ``config.json`` and the headers of the safetensors files and builds the model's shape on
the meta device. Reading an expert reads the bytes of that expert.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from os import PathLike
from typing import Any, final

from torch import Tensor

from mixtura.checkpoints.viewing.base import LayerView
from mixtura.checkpoints.viewing.beyond import beside_experts, layers_beyond, without_prediction
from mixtura.checkpoints.viewing.checks import UNEVEN_KEY, check_present, checked_site
from mixtura.checkpoints.viewing.droppable import Drops, check_drops
from mixtura.checkpoints.viewing.edits import TensorEdit, pruned_config, renumbered, tensor_edits
from mixtura.checkpoints.viewing.mapping import EXPERT_NUMBER
from mixtura.checkpoints.viewing.meta import build_from_config
from mixtura.checkpoints.viewing.opening import open_files
from mixtura.checkpoints.viewing.quantization import refuse_by_names
from mixtura.checkpoints.viewing.reader import CheckpointReader
from mixtura.checkpoints.viewing.records import Site
from mixtura.checkpoints.viewing.refusals import refuse_without_experts
from mixtura.checkpoints.viewing.sites import find_sites
from mixtura.checkpoints.viewing.stored import StoredView
from mixtura.checkpoints.viewing.wrappers import experts_modules
from mixtura.kernels import ExpertTensors


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
class DiskView(StoredView):
    """A checkpoint directory, opened from its headers alone.

    Raises `CheckpointError` for one that is missing, incomplete or damaged, and
    `UnsupportedModelError` for a dense model, an unknown family or a format that is not read.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        opened = open_files(path)
        meta = build_from_config(opened.config)
        if next(experts_modules(meta), None) is None:
            refuse_without_experts(str(opened.config.model_type))
        refuse_by_names(opened.entries, meta)
        super().__init__(opened, meta, opened.entries)
        check_present(self.path, meta, self.sources, self.stored, self._probe.expert_axes.keys())
        self.layers  # noqa: B018  # finding the layers checks their shapes: say so on opening

    @cached_property
    def layers(self) -> tuple[DiskLayer, ...]:
        """The MoE layers, in order."""
        uneven = UNEVEN_KEY in self.raw_config
        found = find_sites(self._meta, dict(self._probe.expert_axes))
        sites = [checked_site(site, self.sources, self.stored, self._shapes, uneven) for site in found]
        return tuple(DiskLayer(site, self._reader) for site in sites)

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

    @cached_property
    def stored_dtype(self) -> str:
        """How most bytes of the experts are stored: ``bfloat16``, ``float32``, ``fp8``, ``mxfp4``, ..."""
        sizes: Counter[str] = Counter()
        for layer in self.layers:
            for parameter in layer.expert_parameters:
                for name in self.sources[parameter].names:
                    sizes[self.stored[name].kind] += self.stored[name].num_bytes
        return sizes.most_common(1)[0][0]
