"""One expert's matrix product, by whichever of PyTorch's kernels is fastest for its shape.

Measured on a 2-core AMD EPYC (AVX512) with PyTorch 2.13: for large float32 weights oneDNN's inner
product reads weights 1.4 to 3 times faster than MKL's sgemm when the batch is 1 to 16 rows, and
computes 5 to 40 % faster beyond; but it compiles a kernel for every new number of rows (about half
a millisecond), which only a large weight pays back. Which kernel runs depends on shapes, strides and
dtype alone, so that the same batch always gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.kernels.dispatch import Run

# Writes the product of rows and a weight, plus a bias or none, to the first argument. Given where to
# write, PyTorch's products are left alone by autocast.
Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]

# An expert's weight and bias by its number.
Lend: TypeAlias = Callable[[int], tuple[Tensor, Tensor | None]]

# Elements of a weight matrix from which compiling a kernel for a new number of rows pays.
LARGE_WEIGHT = 1 << 20
# Rows from which oneDNN is the faster for a weight that is stored transposed.
_MIN_ROWS_TRANSPOSED = 4


def linear_into(
    out: Float[Tensor, "n outputs"],
    x: Float[Tensor, "n inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> None:
    """Write ``x @ weight.T + bias`` to ``out``, in the dtype of the weight. Not differentiable.

    ``weight`` may have any strides; a transposed view costs no copy.
    """
    kernel_for(weight)(out, x.to(weight.dtype), weight, bias)


def linear(
    x: Float[Tensor, "n inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, " outputs"] | None = None,
) -> Float[Tensor, "n outputs"]:
    """``x @ weight.T + bias`` as `linear_into` computes it."""
    out = weight.new_empty(x.shape[0], weight.shape[0])
    linear_into(out, x, weight, bias)
    return out


def grouped_linear(
    x: Float[Tensor, "n inputs"],
    weights: Float[Tensor, "E outputs inputs"],
    biases: Float[Tensor, "E outputs"] | None,
    runs: Sequence[Run],
) -> Float[Tensor, "n outputs"]:
    """`linear` with the weight of each run's expert on the rows of that run, which together are all."""
    x = x.to(weights.dtype)
    return lent_linear(
        x, lambda e: (weights[e], None if biases is None else biases[e]), weights.shape[1], runs
    )


def lent_linear(
    x: Float[Tensor, "n inputs"], lend: Lend, num_outputs: int, runs: Sequence[Run]
) -> Float[Tensor, "n outputs"]:
    """`grouped_linear` with weights that are asked for one after the other and need not stay.

    Args:
        x: the rows of all runs.
        lend: gives an expert's weight and bias, all alike.
        num_outputs: rows of a weight.
        runs: in the order in which experts are asked for.
    """
    out, multiply = x.new_empty(x.shape[0], num_outputs), None
    for expert, start, stop in runs:
        weight, bias = lend(expert)
        if multiply is None:
            multiply, x, out = kernel_for(weight), x.to(weight.dtype), out.to(weight.dtype)
        multiply(out[start:stop], x[start:stop], weight, bias)
    return out


def kernel_for(weight: Float[Tensor, "outputs inputs"]) -> Kernel:
    """The fastest kernel for weights of this shape, dtype and strides, for any number of rows."""
    if weight.device.type == "cpu" and weight.numel() >= LARGE_WEIGHT:
        if weight.dtype == torch.bfloat16:
            return _never_one_row
        # For any other strides, gaps between rows among them, oneDNN takes its reference kernel.
        if weight.dtype == torch.float32 and _has_onednn() and torch.backends.mkldnn.enabled:
            if weight.is_contiguous():
                return _onednn
            if weight.t().is_contiguous():
                return _onednn_for_many_rows
    return _gemm


def _gemm(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _never_one_row(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    # The matrix-vector kernel that one row would take reads weights up to a third slower than the
    # matrix-matrix kernel that two rows take.
    if x.shape[0] == 1:
        two_rows = out.new_empty(2, out.shape[1])
        _gemm(two_rows, x.expand(2, -1), weight, bias)
        out.copy_(two_rows[:1])
    else:
        _gemm(out, x, weight, bias)


def _onednn(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    # The operator of torch.compile's linear layers; it takes ordinary dense tensors.
    product = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    out.copy_(cast(Tensor, product))


def _onednn_for_many_rows(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    multiply = _onednn if x.shape[0] >= _MIN_ROWS_TRANSPOSED else _gemm
    multiply(out, x, weight, bias)


@cache
def _has_onednn() -> bool:
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
