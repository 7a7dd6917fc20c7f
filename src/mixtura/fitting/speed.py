"""How fast one token's weights are read here, in each width, by the kernels that generating uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mixtura.fitting.pace import best_of
from mixtura.fitting.pricing import width_quantizers
from mixtura.fitting.records import KEEP
from mixtura.kernels.compiled import NUMBERS, native
from mixtura.kernels.crossing import multiply
from mixtura.kernels.matrices import coded_matrix, dense_matrix
from mixtura.methods.quantizers import Encoded, Quantizer

# Larger than the caches of most processors, so that the product reads memory.
_READ_BYTES = 64 << 20
_COLS = 2048
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
    for option, quantizer in width_quantizers().items():
        # A few rows, many times over: what they hold does not matter to their speed.
        few = quantizer.encode(torch.randn(16, _COLS, generator=torch.Generator().manual_seed(0)))
        times = max(1, _READ_BYTES // sum(t.nbytes for t in few.tensors.values()))
        tensors = {name: tensor.repeat(times, 1) for name, tensor in few.tensors.items()}
        encoded = Encoded(tensors, {"rows": 16 * times, "cols": _COLS})
        stored = sum(tensor.nbytes for tensor in tensors.values())
        rates[option] = stored / best_of(_coded(x, encoded, quantizer), _REPEATS)
    return rates


def _dense(x: Tensor, weight: Tensor) -> Callable[[], object]:
    matrix = dense_matrix(weight) if native() is not None else None
    return partial(F.linear, x, weight) if matrix is None else partial(multiply, matrix, x, None)


def _coded(x: Tensor, encoded: Encoded, quantizer: Quantizer) -> Callable[[], object]:
    codes, scales = encoded.tensors["codes"], encoded.tensors["scales"]
    bits = codes.shape[1] * 8 // _COLS
    group = _COLS // scales.shape[1]
    matrix = None if native() is None else coded_matrix(codes, scales, cols=_COLS, bits=bits, group=group)
    if matrix is not None:
        return partial(multiply, matrix, x, None)
    # Without the kernels a weight is decoded each time it is used.
    return lambda: F.linear(x, quantizer.decode(encoded, x.dtype))
