"""Units that copy bytes from the source: whole tensors, some of their rows, some of their entries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from mixtura.checkpoints.applying.shards import OutputTensor, Sink, Unit
from mixtura.checkpoints.viewing.headers import TensorEntry
from mixtura.errors import CheckpointError

CHUNK_BYTES = 8 << 20


@final
@dataclass(frozen=True, slots=True)
class Watch:
    """What a tensor is, so that a NaN in it can be reported by layer and expert.

    ``role`` is ``expert`` or ``router``. ``experts`` are the experts that the copied rows belong to,
    in order; empty where rows belong to no single expert. A router's biases may be infinite
    (``finite`` is False). ``exponents``: bytes are exponents of two, of which 255 is NaN.
    """

    layer: int
    role: Literal["expert", "router"]
    experts: tuple[int, ...] = ()
    finite: bool = True
    exponents: bool = False

    def check(self, entry: TensorEntry, piece: Tensor, expert: int | None) -> None:
        """Raise `CheckpointError` where a piece holds NaN, or infinity where there must be none."""
        if self.exponents:
            bad = piece.view(torch.uint8) == 255
        elif entry.dtype.is_floating_point:
            values = piece if piece.dtype.itemsize > 1 else piece.float()
            bad = ~torch.isfinite(values) if self.finite else torch.isnan(values)
        else:
            return
        if bool(bad.any()):
            raise damaged(entry.name, self.layer, expert, self.role)


def damaged(name: str, layer: int, expert: int | None, role: str) -> CheckpointError:
    """The error for a tensor that holds NaN or infinity."""
    what = f"expert {expert}" if expert is not None else f"the {role}"
    return CheckpointError(
        f"{name} ({what} of layer {layer}) holds NaN or infinite values, so the source is damaged; "
        f"download or write it again"
    )


def read_range(entry: TensorEntry, offset: int, num_bytes: int) -> UInt8[Tensor, " B"]:
    """Some bytes of a stored tensor.

    Raises:
        CheckpointError: the file cannot be read or has become shorter.
    """
    piece = torch.empty(num_bytes, dtype=torch.uint8)
    view = piece.numpy().data
    try:
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.offset + offset)
            done = 0
            while done < num_bytes:
                count = stream.readinto(view[done:])
                if not count:
                    raise CheckpointError(
                        f"{entry.file} became shorter while {entry.name} was read; "
                        f"write or download it again and start anew"
                    )
                done += count
    except OSError as error:
        raise CheckpointError(f"cannot read {entry.file}: {error.strerror}") from None
    return piece


@final
@dataclass(frozen=True, eq=False)
class CopyRows(Unit):
    """Copies a tensor, or some rows of it, in chunks, under the same or another name.

    ``rows`` are entries of the first axis (None: the whole tensor).
    """

    output: OutputTensor
    entry: TensorEntry
    rows: tuple[int, ...] | None = None
    watch: Watch | None = None

    @staticmethod
    def of(
        entry: TensorEntry,
        *,
        name: str | None = None,
        rows: tuple[int, ...] | None = None,
        watch: Watch | None = None,
    ) -> CopyRows:
        """The unit that copies `entry`; its output's shape follows from `rows`."""
        shape = entry.shape if rows is None else (len(rows), *entry.shape[1:])
        foreign = None if entry.foreign is None else (entry.foreign, entry.num_bytes)
        return CopyRows(OutputTensor(name or entry.name, entry.dtype, shape, foreign), entry, rows, watch)

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """The one tensor."""
        return (self.output,)

    def write(self, sink: Sink) -> None:
        """Copy it."""
        written = 0
        for start, num_bytes, expert in self._ranges():
            for offset in range(start, start + num_bytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, start + num_bytes - offset)
                piece = read_range(self.entry, offset, size)
                if self.watch is not None:
                    self.watch.check(self.entry, piece.view(self.entry.dtype), expert)
                sink.write(self.output.name, piece, written)
                written += size

    def _ranges(self) -> Iterator[tuple[int, int, int | None]]:
        """Start and length in bytes of what is copied, and the expert it is of."""
        experts = () if self.watch is None else self.watch.experts
        if self.rows is None and len(experts) < 2:
            yield 0, self.entry.num_bytes, experts[0] if experts else None
            return
        rows = range(self.entry.shape[0]) if self.rows is None else self.rows
        row_bytes = self.entry.num_bytes // self.entry.shape[0]
        for place, row in enumerate(rows):
            yield row * row_bytes, row_bytes, experts[place] if place < len(experts) else None


@final
@dataclass(frozen=True, eq=False)
class GatherEntries(Unit):
    """Copies some entries of a small tensor, wherever they lie in it, with the tensor in memory.

    ``numbers`` are the places of the entries in the flattened tensor, in the shape of the result.
    """

    output: OutputTensor
    entry: TensorEntry
    numbers: Int[Tensor, "..."]
    watch: Watch

    @staticmethod
    def of(entry: TensorEntry, numbers: Int[Tensor, "..."], watch: Watch) -> GatherEntries:
        """The unit that copies those entries under the same name."""
        output = OutputTensor(entry.name, entry.dtype, tuple(numbers.shape))
        return GatherEntries(output, entry, numbers, watch)

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """The one tensor."""
        return (self.output,)

    def write(self, sink: Sink) -> None:
        """Copy the entries."""
        whole = read_range(self.entry, 0, self.entry.num_bytes).view(self.entry.dtype)
        gathered = whole[self.numbers]
        self.watch.check(self.entry, gathered, None)
        sink.write(self.output.name, gathered)
