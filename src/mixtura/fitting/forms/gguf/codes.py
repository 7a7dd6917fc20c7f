"""Tensors in llama.cpp's types: made once by its own quantizer, kept, and decoded by the same library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from mixtura.checkpoints.gguf.libraries import LlamaLibrary, encode
from mixtura.checkpoints.gguf.tensors import FileTensor, Importance, Piece
from mixtura.checkpoints.gguf.write import encoded_piece, importance_of, matrix_of
from mixtura.fitting.journal import Journal
from mixtura.kernels.compiled import num_threads

_CODES = "{tensor}.{kind}.codes"
_ROUNDED_WEIGHTS = 1 << 20


@final
class Codes:
    """Codes of a model's tensors by type, made when they are first asked for.

    Args:
        journal: where they are kept.
        library: llama.cpp's quantizers.
        importance: what calibration text says of the matrices' inputs.
    """

    def __init__(self, journal: Journal, library: LlamaLibrary, importance: Importance) -> None:
        self._journal = journal
        self._library = library
        self._importance = importance

    def ensure(self, tensor: FileTensor, check: Callable[[], None] = lambda: None) -> Path:
        """Encode a tensor in its type, on several threads, unless that has been done.

        Args:
            tensor: which one, with its type.
            check: called between pieces; what it raises stops the work.
        """
        path = self._journal.path(_CODES.format(tensor=tensor.name, kind=tensor.kind.name))
        if not path.is_file():

            def save(aside: Path) -> None:
                with aside.open("wb") as file:
                    for codes in self._made(tensor):
                        file.write(codes)
                        check()

            self._journal.write(path.name, save)
        return path

    def read(self, tensor: FileTensor, piece: Piece) -> memoryview:
        """A piece as it lies in the file."""
        size = tensor.num_bytes // len(tensor.pieces)
        with self.ensure(tensor).open("rb") as file:
            file.seek(size * tensor.pieces.index(piece))
            return memoryview(file.read(size))

    def decoded(self, tensor: FileTensor, number: int) -> Tensor:
        """A piece, by its number, as llama.cpp computes with it, in float32."""
        shape = tensor.shape[-2:] if len(tensor.pieces) > 1 else tensor.shape
        size = tensor.num_bytes // len(tensor.pieces)
        with self.ensure(tensor).open("rb") as file:
            file.seek(size * number)
            codes = torch.frombuffer(bytearray(file.read(size)), dtype=torch.uint8)
        rows = codes.numel() // tensor.kind.num_bytes(shape[-1:])
        return self._library.decode(codes, tensor.kind, rows, shape[-1]).reshape(shape)

    def error(self, tensor: FileTensor, sample: Sequence[tuple[Piece, Tensor, float]]) -> float:
        """Squared error of the products of some rows with the inputs that text gives them.

        Args:
            tensor: with its type.
            sample: pieces, some of their rows, and by how much errors of each piece are multiplied.
        """
        found = 0.0
        for piece, rows, weight in sample:
            codes = encode(rows, tensor.kind, self._squares(piece))
            wrong = self._library.decode(codes, tensor.kind, *rows.shape) - rows
            found += weight * self._products(wrong, piece)
        return found

    def size(self, sample: Sequence[tuple[Piece, Tensor, float]]) -> float:
        """The same of the products themselves."""
        return sum(weight * self._products(rows, piece) for piece, rows, weight in sample)

    def _squares(self, piece: Piece) -> Tensor | None:
        return None if piece.inputs is None else self._importance.get(piece.inputs)

    def _products(self, rows: Tensor, piece: Piece) -> float:
        squares = self._squares(piece)
        summed = rows.double().square()
        return float((summed if squares is None else summed @ squares.double()).sum())

    def _made(self, tensor: FileTensor) -> Iterator[memoryview]:
        with ThreadPoolExecutor(num_threads()) as pool:
            if len(tensor.pieces) > 1:
                yield from pool.map(
                    lambda piece: encoded_piece(tensor, piece, self._importance), tensor.pieces
                )
                return
            # Rows stand alone: a large matrix is not in float32 as a whole, nor rounded by one thread.
            (piece,) = tensor.pieces
            weighed = importance_of(tensor, piece, self._importance)
            rows = matrix_of(tensor, piece).split(max(1, _ROUNDED_WEIGHTS // tensor.shape[-1]))
            for codes in pool.map(lambda part: encode(part, tensor.kind, weighed), rows):
                yield codes.numpy().data
