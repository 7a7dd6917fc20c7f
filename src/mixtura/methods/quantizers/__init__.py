"""Storing weight matrices in fewer bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

KIND = {"base": "Quantizer", "summary": "Stores a weight matrix in fewer bits."}


@final
@dataclass(frozen=True, slots=True)
class Encoded:
    """A matrix in fewer bits: named tensors (what is written to disk) and small JSON values.

    ``meta`` holds what decoding needs beside the tensors: at least ``rows`` and ``cols``.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@final
@dataclass(frozen=True, slots=True, eq=False)
class LayerSeen:
    """What the experts of one layer were given on calibration text, and the matrices that read it.

    Attributes:
        hidden: the layer's tokens.
        index: the experts that each token chose; below 0 where it chose none.
        experts: the numbers of those that are stored.
        first: an expert's first matrix, by its number.
        router: the router's row of each expert.
    """

    hidden: Float[Tensor, "T D"]
    index: Int[Tensor, "T K"]
    experts: tuple[int, ...]
    first: Callable[[int], Float[Tensor, "R D"]]
    router: Float[Tensor, "E D"]


class Quantizer(ABC):
    """Stores a weight matrix in fewer bits and gives it back.

    Rows are output features and columns input features (the axis a matmul sums over), whatever the
    layout of the model.
    """

    @abstractmethod
    def encode(self, weight: Float[Tensor, "R C"], moments: Float[Tensor, "C C"] | None = None) -> Encoded:
        """The matrix in fewer bits.

        Args:
            weight: the matrix, in any floating dtype.
            moments: sum of the products of every two input features over the inputs that the matrix is to
                be multiplied with, each scaled as its output is, for methods that mind what outputs lose.

        Raises:
            UserError: the matrix holds NaN or infinity, or its moments do.
        """

    @abstractmethod
    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Float[Tensor, "R C"]:
        """The matrix back, in `dtype`."""

    @abstractmethod
    def num_bytes(self, rows: int, cols: int) -> int:
        """Bytes `encode` takes for a matrix of this size, exactly, without encoding one."""

    def for_layer(self, layer: LayerSeen) -> Quantizer:
        """What encodes the first matrices of a layer's experts, for methods that look at them together.

        What it encodes is decoded by this very quantizer, and takes as many bytes.
        """
        del layer
        return self

    @property
    def form(self) -> str:
        """How codes lie, for the compiled kernels: ``levels``, ``nested`` or ``trellis``; else empty.

        Quantizers of one form store the same tensors under the same settings ``bits`` and ``group_size``.
        """
        return ""

    @property
    def widths(self) -> Mapping[int, tuple[str, ...]]:
        """Bits that one encoding can be read at, and the names of the tensors that each reads.

        `decode` takes an `Encoded` of just those tensors. Empty where an encoding is read as a whole.
        """
        return {}

    @final
    def bits_per_weight(self, rows: int, cols: int) -> float:
        """Bits a weight of such a matrix takes, scales included."""
        return 8 * self.num_bytes(rows, cols) / (rows * cols)
