"""From how many rows on PyTorch's matmul is faster than the compiled kernels: measured, and kept.

The compiled kernels read weights as fast as memory gives them; PyTorch's compute faster. Where the one
overtakes the other depends on the processor, the number of threads and the width of the weights, so
each pair is timed when it is first asked for and the answer kept for this machine and these kernels.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from mixtura.kernels.coded import stored_matrix
from mixtura.kernels.compiled import NUMBERS, isas, native, num_threads, options, rows_of, way_for, with_rows
from mixtura.kernels.matmul import linear
from mixtura.kernels.matrices import Matrix, dense_matrix
from mixtura.machine.kept import keep, read_kept
from mixtura.machine.processor import processor_name
from mixtura.methods import create
from mixtura.methods.quantizers import Encoded

# Up to so many rows reading is what takes the time, whatever the machine.
ALWAYS_FEW: Final = 2
_ROWS: Final = (4, 8, 16, 32, 64, 128, 256)
_OUTPUTS, _INPUTS, _GROUP, _TRELLIS_GROUP = 2048, 2048, 64, 128
_REPEATS = 5
_ASLEEP_SECONDS = 0.02
_FILE = "kernels"


def few_rows(bits: int, dtype: torch.dtype) -> int:
    """Rows up to which a matrix of ``bits`` a weight is best multiplied by the compiled kernels.

    ``dtype`` is that of the rows.
    """
    return _few_rows(bits, False, dtype, num_threads(), options().int8_inputs, options().isa)


def few_rows_of(matrix: Matrix, dtype: torch.dtype) -> int:
    """`few_rows` of matrices that are stored like this one."""
    chosen = options()
    form = matrix.bits, matrix.is_trellis
    return _few_rows(*form, dtype, num_threads(), chosen.int8_inputs, chosen.isa)


@cache
def _few_rows(bits: float, is_trellis: bool, dtype: torch.dtype, threads: int, int8: bool, isa: str) -> int:
    key = f"{_machine()}, kernels {_kernels()}, {isa or isas()[-1]}, {threads} threads"
    inputs = "int8" if int8 else str(dtype).removeprefix("torch.")
    name = f"{bits:g} bits{' of a trellis' if is_trellis else ''}, {inputs}"
    known = read_kept(_FILE)
    if name not in known.get(key, {}):
        known.setdefault(key, {})[name] = _measure(bits, is_trellis, dtype)
        keep(_FILE, known)
    return int(known[key][name])


def _machine() -> str:
    return f"{processor_name()}, torch {torch.__version__}"


@cache
def _kernels() -> str:
    """Names the build of the extension: another one crosses elsewhere."""
    extension = native()
    assert extension is not None
    return hashlib.blake2b(Path(extension.__file__).read_bytes(), digest_size=6).hexdigest()


@torch.no_grad()
def _measure(bits: float, is_trellis: bool, dtype: torch.dtype) -> int:
    ours, theirs, weights = _contenders(bits, is_trellis, dtype)
    generator = torch.Generator().manual_seed(0)
    gains = []
    for rows in _ROWS:
        x = torch.randn(rows, _INPUTS, generator=generator).to(dtype)
        # PyTorch's threads spin for some milliseconds after their last work, and would do so beside ours.
        time.sleep(_ASLEEP_SECONDS)
        mine, other = _seconds(partial(ours, x), weights), _seconds(partial(theirs, x), weights)
        gains.append(math.log(other / mine))
    return _best_split(gains)


def _best_split(gains: list[float]) -> int:
    """The rows up to which the gains (logarithms, one for each of `_ROWS`) add up to the most.

    One disturbed measurement does not decide that.
    """
    sums = [0.0, *itertools.accumulate(gains)]
    return (ALWAYS_FEW, *_ROWS)[max(range(len(sums)), key=sums.__getitem__)]


_Contenders = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], tuple[Tensor, ...]]


def _contenders(bits: float, is_trellis: bool, dtype: torch.dtype) -> _Contenders:
    generator = torch.Generator().manual_seed(0)
    if bits > 8:
        stored = torch.float32 if bits == 32 else torch.bfloat16
        weight = torch.randn(_OUTPUTS, _INPUTS, generator=generator).to(stored)
        matrix = dense_matrix(weight)
        assert matrix is not None
        return partial(multiply, matrix), lambda x: linear(x, weight), (weight,)
    if is_trellis:
        name, group = "trellis", _TRELLIS_GROUP
        codes_shape: tuple[int, ...] = (_OUTPUTS // 64, _INPUTS, int(8 * bits))
        scales_shape: tuple[int, ...] = (_OUTPUTS // 64, _INPUTS // group, 64)
    else:
        bits, name, group = int(bits), "round_to_nearest", _GROUP
        codes_shape = (_OUTPUTS, _INPUTS * bits // 8)
        scales_shape = (_OUTPUTS, 1 if bits == 8 else _INPUTS // group)
    quantizer = create("quantizers", name, bits=bits, group_size=group)
    codes = torch.randint(0, 256, codes_shape, generator=generator, dtype=torch.uint8)
    tensors = {"codes": codes, "scales": torch.full(scales_shape, 0.01, dtype=torch.bfloat16)}
    encoded = Encoded(tensors, {"rows": _OUTPUTS, "cols": _INPUTS})
    coded = stored_matrix(quantizer, tensors, rows=_OUTPUTS, cols=_INPUTS)
    assert coded is not None
    return (
        partial(multiply, coded),
        lambda x: linear(x, quantizer.decode(encoded, dtype)),
        (*tensors.values(),),
    )


def multiply(matrix: Matrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ matrix.T + bias`` by the compiled kernels, in the dtype of ``x``, for rows of any axes."""
    extension = native()
    assert extension is not None
    assert x.dtype in NUMBERS
    assert x.shape[-1] == matrix.cols
    rows = x if x.is_contiguous() else with_rows(x.reshape(-1, matrix.cols))
    out = x.new_empty(*x.shape[:-1], matrix.rows)
    number, stride = NUMBERS[x.dtype], matrix.cols if rows is x else rows.stride(0)
    extension.linear(
        way_for(x.dtype),
        matrix.record,
        rows_of(bias),
        extension.Rows(rows.data_ptr(), number, stride),
        out.numel() // matrix.rows,
        extension.Rows(out.data_ptr(), number, matrix.rows),
    )
    return out


def _seconds(work: Callable[[], object], weights: tuple[Tensor, ...]) -> float:
    """Of the fastest of a few runs, after one that warms up; weights come from memory, as a model's do."""
    extension = native()
    assert extension is not None
    work()
    times = []
    for _ in range(_REPEATS):
        for weight in weights:
            extension.evict(weight.data_ptr(), weight.nbytes)
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
