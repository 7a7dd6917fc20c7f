"""How fast one token's weights are read here, in each width, by the kernels that generating uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mixtura.checkpoints.packed import MatrixRecord, PackedMatrix
from mixtura.fitting.pace import best_of
from mixtura.fitting.palette import KEEP, STORED, quantizer_of
from mixtura.kernels.compiled import NUMBERS, native
from mixtura.kernels.crossing import multiply
from mixtura.kernels.matrices import dense_matrix

# Larger than the caches of most processors, so that the product reads memory.
_READ_BYTES = 64 << 20
_COLS = 2048
_FEW_ROWS = 64
_REPEATS = 5


def read_rates(dtype: torch.dtype) -> dict[int, float]:
    """Bytes of weights per second that a product with one token reads, by option of an expert.

    Args:
        dtype: of unchanged weights and of the token.
    """
    kept = dtype if dtype in NUMBERS else torch.bfloat16
    x = torch.randn(1, _COLS, generator=torch.Generator().manual_seed(0)).to(kept)
    rows = _READ_BYTES // (_COLS * kept.itemsize)
    weight = torch.zeros(rows, _COLS, dtype=kept)
    rates = {KEEP: weight.nbytes / best_of(_dense(x, weight), _REPEATS)}
    for option in STORED:
        stored = _many_rows(option)
        rates[option] = stored.num_bytes / best_of(_coded(x, stored), _REPEATS)
    return rates


def _dense(x: Tensor, weight: Tensor) -> Callable[[], object]:
    matrix = dense_matrix(weight) if native() is not None else None
    return partial(F.linear, x, weight) if matrix is None else partial(multiply, matrix, x, None)


def _many_rows(option: int) -> PackedMatrix:
    """A matrix larger than the caches: a few rows, many times over, for what they hold does not matter."""
    quantizer, way = quantizer_of(option), STORED[option]
    few = quantizer.encode(torch.randn(_FEW_ROWS, _COLS, generator=torch.Generator().manual_seed(0)))
    times = max(1, _READ_BYTES // few.num_bytes)
    tensors = {name: torch.cat([tensor] * times) for name, tensor in few.tensors.items()}
    rows = _FEW_ROWS * times
    parts = tuple(sorted(tensors))
    meta = {**few.meta, "rows": rows}
    record = MatrixRecord(rows, _COLS, "float32", parts, way.quantizer, dict(way.settings), meta)
    return PackedMatrix(record, tensors)


def _coded(x: Tensor, stored: PackedMatrix) -> Callable[[], object]:
    matrix = None if native() is None else stored.native()
    if matrix is not None:
        return partial(multiply, matrix, x, None)
    # Without the kernels a weight is decoded each time it is used.
    return lambda: F.linear(x, stored.dense(x.dtype))
