"""The compiled search for the codes of trellises, and their decoding."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.kernels.compiled import NUMBERS, native, options, rows_of, way_for
from mixtura.kernels.matrices import trellis_matrix
from mixtura.methods._trellis import (
    ROWS,
    Columns,
    Searched,
    Stored,
    decode_plainly,
    search_plainly,
    use_compiled,
)


def search_compiled(columns: Columns) -> Searched:
    """The search by the compiled kernels; by PyTorch's operators where there are none."""
    weights, originals, scales, factor, rate, table = columns
    tensors = (weights, originals, scales, factor)
    ready = all(one.dtype == torch.float32 and one.is_contiguous() and one.is_cpu for one in tensors)
    extension = native()
    if extension is None or options().mode == "torch" or not ready:
        return search_plainly(columns)
    num_columns, rows = weights.shape
    codes = torch.empty(num_columns, rows // ROWS, rate, dtype=torch.uint8)
    left = torch.empty_like(weights)
    extension.search_trellis(
        options().isa,
        weights.data_ptr(),
        originals.data_ptr(),
        scales.data_ptr(),
        factor.data_ptr(),
        factor.stride(0),
        left.data_ptr(),
        codes.data_ptr(),
        table.data_ptr(),
        rate,
        rows,
        num_columns,
    )
    return Searched(codes, left)


def decode_compiled(stored: Stored, dtype: torch.dtype) -> Float[Tensor, "R C"]:
    """The matrix by the compiled kernels; by PyTorch's operators where these cannot."""
    codes, scales, rows, group, _ = stored
    cols = codes.shape[1]
    extension = native()
    if extension is None or options().mode == "torch" or dtype not in NUMBERS:
        return decode_plainly(stored, dtype)
    matrix = trellis_matrix(codes, scales, rows=rows, cols=cols, group=group)
    if matrix is None:
        return decode_plainly(stored, dtype)
    out = torch.empty(rows, cols, dtype=dtype)
    extension.decode(way_for(dtype), matrix.record, rows_of(out))
    return out


use_compiled(search_compiled, decode_compiled)
