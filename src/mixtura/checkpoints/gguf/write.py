"""Writing a GGUF file: its head first, then one matrix at a time, finished or absent."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
import torch
from torch import Tensor

from mixtura.checkpoints.applying.shards import sync_folder
from mixtura.checkpoints.gguf.families import family_of, fields_of
from mixtura.checkpoints.gguf.libraries import encode
from mixtura.checkpoints.gguf.package import gguf_package
from mixtura.checkpoints.gguf.tensors import FileTensor, Importance, Piece, file_tensors
from mixtura.checkpoints.gguf.types import TypeRules
from mixtura.checkpoints.gguf.vocabulary import vocabulary
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.viewing.beside import require_alone
from mixtura.errors import CheckpointError, OutputError
from mixtura.report import counted
from mixtura.report.units import format_bytes

Advance = Callable[[int], None]
Encoded = Callable[[FileTensor, Piece], memoryview]
UNFINISHED_SUFFIX = ".partial"
_ALIGNMENT = 32
_SLACK_BYTES = 1 << 20


@final
@dataclass(frozen=True, slots=True)
class GgufFile:
    """A file to be: what it says of the model, and its tensors."""

    arch: str
    name: str
    fields: dict[str, Any]
    tokens: dict[str, Any]
    tensors: tuple[FileTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, about the size of the file."""
        return sum(_aligned(tensor.num_bytes) for tensor in self.tensors)

    @property
    def types(self) -> dict[str, int]:
        """Bytes by type, the most first."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.kind.name] += tensor.num_bytes
        return dict(sizes.most_common())

    @property
    def gave_way(self) -> dict[tuple[str, str, int], int]:
        """Tensors that could not have the type asked for: by it, the type they have and their rows' width."""
        found: Counter[tuple[str, str, int]] = Counter()
        for tensor in self.tensors:
            if tensor.wanted is not None:
                found[tensor.wanted, tensor.kind.name, tensor.shape[-1]] += 1
        return dict(found)


def plan_file(view: CheckpointView, name: str, rules: TypeRules, *, calibrated: bool) -> GgufFile:
    """What the file of a model will be; reads headers and the tokenizer alone.

    Raises:
        CheckpointError: the tokenizer is missing or damaged.
        UnsupportedModelError: llama.cpp does not know the family, a setting, a tensor or the tokenizer.
        UserError: a type cannot be written, or a rule is for nothing.
    """
    require_alone(view.path, "a GGUF file")
    family = family_of(view)
    return GgufFile(
        family.arch,
        name,
        fields_of(view, family),
        vocabulary(view.path, int(view.config.vocab_size)).fields,
        file_tensors(view, family, rules, calibrated=calibrated),
    )


def write_file(planned: GgufFile, out: Path, encoded: Encoded, advance: Advance) -> None:
    """Write the file beside its place and move it there when all of it is on the disk.

    Args:
        planned: what to write.
        out: the new file.
        encoded: gives each piece's bytes; see `encoding`.
        advance: told of the bytes that were just written; what it raises stops the writing.

    Raises:
        OutputError: the file exists, or cannot be written.
        CheckpointError: a tensor that is read is damaged.
    """
    check_out(out)
    with _aside(out, planned.num_bytes) as unfinished:
        _write_head(planned, unfinished)
        with unfinished.open("ab") as stream:
            _pad(stream)
            for tensor in planned.tensors:
                for piece in tensor.pieces:
                    advance(stream.write(encoded(tensor, piece)))
                _pad(stream)
            stream.flush()
            os.fsync(stream.fileno())


def check_out(out: Path) -> None:
    """Refuse a place that holds something or cannot be written.

    Raises:
        OutputError: so it is.
    """
    if out.exists():
        raise OutputError(f"{out} exists and is never overwritten; delete it or give another file")
    if not out.parent.is_dir():
        raise OutputError(f"there is no directory {out.parent} to write {out.name} to; make it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out} cannot be written: no permission; give a file in a directory of yours")


@contextmanager
def _aside(out: Path, num_bytes: int) -> Iterator[Path]:
    """A file that takes the place of `out` at the end, or goes where something stopped the work."""
    unfinished = out.with_name(out.name + UNFINISHED_SUFFIX)
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes + _SLACK_BYTES:
        raise OutputError(
            f"{out.parent} has {format_bytes(free)} free and writing {out.name} needs "
            f"{format_bytes(num_bytes + _SLACK_BYTES)}; make room or choose another place"
        )
    try:
        yield unfinished
        check_out(out)
        unfinished.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        raise OutputError(
            f"writing {out} failed: {error.strerror or error}; make room or choose another place; nothing "
            f"was left behind"
        ) from None
    finally:
        with suppress(OSError):
            unfinished.unlink()


def _write_head(planned: GgufFile, path: Path) -> None:
    """Everything before the tensors' values."""
    package = gguf_package()
    writer = package.GGUFWriter(path, planned.arch)
    writer.add_type("model")
    writer.add_name(planned.name)
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    for key, value in planned.fields.items():
        _add(writer, f"{planned.arch}.{key}", value)
    for key, value in planned.tokens.items():
        _add(writer, key if key == "chat_template" else f"tokenizer.ggml.{key}", value)
    for tensor in planned.tensors:
        kind = package.GGMLQuantizationType(tensor.kind.number)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """One setting, in the format's type for its kind."""
    if key == "chat_template":
        writer.add_chat_template(value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def encoding(importance: Importance) -> Encoded:
    """Encodes each piece when it is asked for.

    Args:
        importance: what calibration text says of the matrices' inputs.
    """
    return lambda tensor, piece: encoded_piece(tensor, piece, importance)


def encoded_piece(tensor: FileTensor, piece: Piece, importance: Importance) -> memoryview:
    """A piece as the bytes of its tensor's type.

    Raises:
        CheckpointError: what is read holds NaN or infinity.
    """
    weighed = importance_of(tensor, piece, importance)
    return encode(matrix_of(tensor, piece), tensor.kind, weighed).numpy().data


def matrix_of(tensor: FileTensor, piece: Piece) -> Tensor:
    """A piece as rows of its tensor's width.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    value = piece.read()
    if not torch.isfinite(value).all():
        raise CheckpointError(
            f"what {tensor.name} is made of holds NaN or infinity; the checkpoint is damaged, download it "
            f"again"
        )
    return value.reshape(-1, tensor.shape[-1])


def importance_of(tensor: FileTensor, piece: Piece, importance: Importance) -> Tensor | None:
    """What errors of a piece are weighed by; None where nothing is known."""
    return importance.get(piece.inputs) if piece.inputs is not None and len(tensor.shape) > 1 else None


def _pad(stream: BinaryIO) -> None:
    stream.write(bytes(_aligned(stream.tell()) - stream.tell()))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def gave_way_lines(planned: GgufFile) -> Sequence[str]:
    """For people: which tensors have another type than was asked for, and why."""
    return [
        f"{counted(count, 'tensor')} with rows of {cols}, no whole blocks of {wanted}: {kind} instead"
        for (wanted, kind, cols), count in planned.gave_way.items()
    ]
