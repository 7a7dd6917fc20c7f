"""What writes the tensors of an upcycled checkpoint, each known before its first byte is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mixtura.checkpoints.applying.copying import CHUNK_BYTES
from mixtura.checkpoints.applying.shards import OutputTensor, Sink, Unit
from mixtura.checkpoints.dense.view import Piece
from mixtura.checkpoints.upcycling.experts import Workshop, read_piece
from mixtura.errors import UserError
from mixtura.types.upcycling import Approach, Build, Fill


@final
@dataclass(frozen=True, eq=False)
class SumPieces(Unit):
    """Writes the weighted sum of pieces of the same shape, rows at a time; one alone goes as it is."""

    output: OutputTensor
    pieces: tuple[Piece, ...]
    weights: tuple[float, ...]

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """The one tensor."""
        return (self.output,)

    def write(self, sink: Sink) -> None:
        """Read, add and write."""
        num_rows = self.output.shape[0]
        row_bytes = self.output.num_bytes // max(num_rows, 1)
        step = max(1, CHUNK_BYTES // max(row_bytes, 1))
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            sink.write(self.output.name, self._rows(start, stop), start * row_bytes)

    def _rows(self, start: int, stop: int) -> Tensor:
        if len(self.pieces) == 1 and self.weights == (1.0,):
            return read_piece(self.pieces[0], start, stop).to(self.output.dtype)
        total = torch.zeros(stop - start, *self.output.shape[1:])
        for piece, weight in zip(self.pieces, self.weights, strict=True):
            total += weight * read_piece(piece, start, stop).float()
        return total.to(self.output.dtype)


@final
@dataclass(frozen=True, slots=True)
class Place:
    """Where an expert's three matrices go: names of tensors and how many bytes into each."""

    names: tuple[str, str, str]
    offsets: tuple[int, int, int] = (0, 0, 0)


@final
@dataclass(frozen=True, eq=False)
class WriteExperts(Unit):
    """Makes experts one after the other and writes each where it belongs."""

    outputs: tuple[OutputTensor, ...]
    experts: tuple[tuple[Build | Approach, Place], ...]
    workshop: Workshop
    down_scale: float = 1.0

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """The tensors of all of them."""
        return self.outputs

    def write(self, sink: Sink) -> None:
        """Make and write them."""
        for action, place in self.experts:
            made = self.workshop.make(action, self.down_scale)
            for matrix, name, offset in zip(made, place.names, place.offsets, strict=True):
                sink.write(name, matrix, offset)
            del made


@final
@dataclass(frozen=True, eq=False)
class WriteValues(Unit):
    """Writes a tensor that is small and was computed: rows of a router, a bias, zeros."""

    output: OutputTensor
    values: Tensor

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """The one tensor."""
        return (self.output,)

    def write(self, sink: Sink) -> None:
        """Write it."""
        sink.write(self.output.name, self.values.to(self.output.dtype))


@final
@dataclass(frozen=True, eq=False)
class FillValues(Unit):
    """Writes a parameter of a router that is made of a dense model's matrix."""

    output: OutputTensor
    action: Fill
    workshop: Workshop

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """The one tensor."""
        return (self.output,)

    def write(self, sink: Sink) -> None:
        """Make and write it.

        Raises:
            UserError: it is of another shape than the router's.
        """
        made = self.workshop.filled(self.action)
        if tuple(made.shape) != self.output.shape:
            raise UserError(
                f"the plan makes {self.output.name} of shape {tuple(made.shape)}, and the router's is of "
                f"{self.output.shape}"
            )
        sink.write(self.output.name, made.to(self.output.dtype).contiguous())
