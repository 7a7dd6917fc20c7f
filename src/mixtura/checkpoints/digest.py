"""A cheap name for a checkpoint: the same for the same files, another for other weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol, runtime_checkable

from mixtura.errors import CheckpointError


@runtime_checkable
class Digest(Protocol):
    """What takes bytes to be hashed."""

    def update(self, data: bytes, /) -> None:
        """Take more of them."""


_SAMPLES = 64
_SAMPLE_BYTES = 4096


def checkpoint_digest(directory: Path) -> str:
    """``sha256:...`` of a checkpoint directory, in milliseconds whatever its size.

    Hashes ``config.json`` and, for each safetensors file by name, its size, its header and 64 evenly
    spread pieces of its bytes: enough to tell two fine-tunes of one model apart, not proof against
    someone who wants two checkpoints to look alike.

    Raises:
        CheckpointError: the directory holds no ``config.json`` or no safetensors file, or one of them
            cannot be read.
    """
    config = directory / "config.json"
    # An index may name files of a folder inside.
    shards = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*/*.safetensors"))
    if not config.is_file() or not shards:
        raise CheckpointError(
            f"{directory} is not a model directory: it needs config.json and *.safetensors files"
        )
    digest = hashlib.sha256()
    try:
        _add(digest, config.name, config.read_bytes())
        for shard in shards:
            _add(digest, shard.name, _summary(shard))
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from None
    return f"sha256:{digest.hexdigest()}"


def _add(digest: Digest, name: str, content: bytes) -> None:
    digest.update(f"{name}\0{len(content)}\0".encode())
    digest.update(content)


def _summary(shard: Path) -> bytes:
    """Size, header and pieces of a safetensors file."""
    size = shard.stat().st_size
    with shard.open("rb") as stream:
        length = min(int.from_bytes(stream.read(8), "little"), max(size - 8, 0))
        pieces = [str(size).encode(), stream.read(length)]
        rest = size - stream.tell()
        start = stream.tell()
        for sample in range(_SAMPLES):
            stream.seek(start + max(rest - _SAMPLE_BYTES, 0) * sample // (_SAMPLES - 1))
            pieces.append(stream.read(_SAMPLE_BYTES))
    return b"\0".join(pieces)
