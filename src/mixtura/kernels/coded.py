"""Matrices that quantizers stored, for the compiled kernels, by how their codes lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor

from mixtura.kernels.matrices import Matrix, coded_matrix, nested_matrix, trellis_matrix
from mixtura.methods.quantizers import Quantizer


def stored_matrix(
    quantizer: Quantizer, tensors: Mapping[str, Tensor], *, rows: int, cols: int
) -> Matrix | None:
    """A matrix in place; None where the kernels do not read codes that lie so.

    Args:
        quantizer: what stored it.
        tensors: what was stored, or of several widths in one copy what the widest of them reads.
        rows: output features.
        cols: input features.
    """
    make = _MAKERS.get(quantizer.form)
    return None if make is None else make(quantizer, tensors, rows, cols)


def _levels(quantizer: Any, tensors: Mapping[str, Tensor], rows: int, cols: int) -> Matrix | None:
    del rows
    bits = int(quantizer.bits)
    group = cols if bits == 8 else min(quantizer.group_size, cols)
    return coded_matrix(tensors["codes"], tensors["scales"], cols=cols, bits=bits, group=group)


def _nested(quantizer: Any, tensors: Mapping[str, Tensor], rows: int, cols: int) -> Matrix | None:
    del rows
    there = {bits: names for bits, names in quantizer.widths.items() if set(names) <= set(tensors)}
    bits, names = max(there.items())
    *planes, scales = (tensors[name] for name in names)
    return nested_matrix(planes, scales, cols=cols, bits=bits, group=min(quantizer.group_size, cols))


def _trellis(quantizer: Any, tensors: Mapping[str, Tensor], rows: int, cols: int) -> Matrix | None:
    group = min(quantizer.group_size, cols)
    return trellis_matrix(tensors["codes"], tensors["scales"], rows=rows, cols=cols, group=group)


_MAKERS: Final[Mapping[str, Callable[[Any, Mapping[str, Tensor], int, int], Matrix | None]]] = {
    "levels": _levels,
    "nested": _nested,
    "trellis": _trellis,
}
