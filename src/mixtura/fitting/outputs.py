"""What layers put out while a text runs through a model, kept so that stopped work passes them quickly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

from safetensors.torch import save_file
from torch import Tensor

from mixtura.checkpoints.viewing.headers import TensorFiles, read_header
from mixtura.fitting.journal import Journal


@final
class KeptOutputs:
    """What the layers of one pass put out, in the journal.

    Args:
        journal: the journal.
        name: of the pass.
    """

    def __init__(self, journal: Journal, name: str) -> None:
        self._journal = journal
        self._name = name

    def path(self, number: int, call: int) -> Path:
        """The file of a layer's call."""
        return self._journal.path(f"{self._name}-{number}-{call}.safetensors")

    def read(self, number: int, call: int) -> dict[str, Tensor] | None:
        """What was kept of a layer's call; None where it was not done."""
        path = self.path(number, call)
        if not path.is_file():
            return None
        files = TensorFiles(read_header(path))
        return {name: files.read(name) for name in files.entries}

    def keep(self, number: int, call: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what a layer's call put out."""
        held = {name: tensor.contiguous() for name, tensor in tensors.items()}

        def save(aside: Path) -> None:
            save_file(held, str(aside))

        self._journal.write(self.path(number, call).name, save)

    def forget(self) -> None:
        """Remove all of it: the pass is over."""
        for path in self._journal.directory.glob(f"{self._name}-*-*.safetensors"):
            path.unlink()
