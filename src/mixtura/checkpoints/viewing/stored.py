"""What the views of checkpoint directories have in common, ordinary ones and those of the mixtura format."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mixtura.checkpoints.packed import MatrixRecord
from mixtura.checkpoints.viewing.base import ModelView
from mixtura.checkpoints.viewing.formats import StoredTensor, stored_tensors
from mixtura.checkpoints.viewing.headers import TensorEntry, TensorFiles
from mixtura.checkpoints.viewing.mapping import add_tied, map_sources
from mixtura.checkpoints.viewing.opening import OpenedFiles, no_collection
from mixtura.checkpoints.viewing.probe import CountField, Probe, probe
from mixtura.checkpoints.viewing.reader import make_reader
from mixtura.errors import suggest


class StoredView(ModelView, ABC):
    """A checkpoint directory, from its headers alone.

    Args:
        opened: its files.
        meta: the model on the meta device.
        entries: the tensors that transformers' conversion rules apply to: all but those of packed experts.
        packed: tensors that are in mixtura's own format, by the name that they have in the model's.
    """

    def __init__(
        self,
        opened: OpenedFiles,
        meta: nn.Module,
        entries: Mapping[str, TensorEntry],
        packed: Mapping[str, StoredTensor] | None = None,
    ) -> None:
        self.path: Path = opened.path
        self.files: tuple[Path, ...] = opened.files
        self.raw_config = opened.raw_config
        self.entries = opened.entries
        self._config = opened.config
        self._meta = meta
        with no_collection():
            self.stored = {**stored_tensors(entries), **(packed or {})}
            self.sources, self.unused_names = map_sources(meta, self.stored)
        add_tied(self.sources, meta)
        self._files = TensorFiles(opened.entries)
        self._shapes, self._reader = make_reader(opened, meta, self.stored, self.sources, self._files)

    # How matrices outside the experts are stored that are in fewer bits, by their names on disk.
    matrices: Mapping[str, MatrixRecord] = {}

    @property
    def config(self) -> Any:
        """The transformers config: of the source, where this was made from another checkpoint."""
        return self._config

    @property
    def meta_model(self) -> nn.Module:
        """The model on the meta device, with as many experts as the config says. Do not change it."""
        return self._meta

    @cached_property
    def _probe(self) -> Probe:
        return probe(self._meta, self._config)

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

    def parameter(self, name: str) -> Tensor:
        """One parameter outside packed experts by the model's own name, converted and decoded."""
        return self._reader.parameter(name)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(entry.num_bytes for entry in self.entries.values())
