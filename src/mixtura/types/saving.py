"""Writing tensors to a file, or the reason why not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mixtura.errors import OutputError


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OutputError: it cannot be written there.
    """
    try:
        save_file(dict(tensors), str(path), metadata=dict(metadata))
    except SafetensorError as error:
        reason = str(error).partition("I/O error: ")[2].partition(" (os error")[0] or str(error)
        raise OutputError(f"{path} cannot be written ({reason.lower()}); give a path that can") from None
