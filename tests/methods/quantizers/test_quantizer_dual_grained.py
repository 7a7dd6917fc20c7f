"""What the quantizer dual_grained promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods.quantizers._shared import unpack
from mixtura.methods.quantizers.dual_grained import DualGrained

RANGES, STEPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6), (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


def normal(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("cols", [96, 70])
def test_a_row_is_whole_numbers_of_a_byte_and_one_scale(bits: int, cols: int) -> None:
    quantizer = DualGrained(bits=bits, group_size=32)
    encoded = quantizer.encode(normal(6, cols))
    whole = quantizer.decode(encoded) / encoded.tensors["scales"].float()
    assert float(whole.abs().max()) <= 127
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-3)


def of_group(own: Tensor, top: int) -> tuple[float, int]:
    """The scale and zero point of least squared error, weight by weight."""
    best = (float("inf"), 0.0, 0)
    low, high = min(0.0, float(own.min())), max(0.0, float(own.max()))
    for share in RANGES:
        scale = (high - low) * share / top
        point = min(max(round(-low * share / scale), 0), top)
        lost = 0.0
        for weight in own.tolist():
            code = min(max(round(weight / scale + point), 0), top)
            lost += ((code - point) * scale - weight) ** 2
        if lost < best[0]:
            best = (lost, scale, point)
    return best[1], best[2]


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("weighed", [False, True])
def test_the_two_searches_by_a_loop(bits: int, weighed: bool) -> None:
    weight, group, top = normal(3, 48, seed=bits), 16, 2**bits - 1
    inputs = normal(100, 10, seed=5) @ normal(10, 48, seed=6)
    moments = inputs.T @ inputs if weighed else None
    encoded = DualGrained(bits=bits, group_size=group).encode(weight, moments)
    codes = unpack(encoded.tensors["codes"], bits, 48, torch.float32)
    for row in range(3):
        fine = [of_group(weight[row, first : first + group], top) for first in range(0, 48, group)]
        reach = [max(point, top - point) for _, point in fine]
        widest = max(scale * most for (scale, _), most in zip(fine, reach, strict=True)) / 127
        found = []
        for share in STEPS:
            scale = float(torch.tensor(widest * share).to(torch.bfloat16))
            steps, levels, off = [], [], torch.zeros(48)
            for place, weight_here in enumerate(weight[row].tolist()):
                (own, point), most = fine[place // group], reach[place // group]
                step = max(min(round(own / scale), 127 // most), 1)
                code = min(max(round(weight_here / (scale * step) + point), 0), top)
                steps.append(step)
                levels.append(code)
                off[place] = (code - point) * scale * step - weight_here
            lost = float(off @ off) if moments is None else float(off @ moments @ off)
            found.append((lost, scale, steps[::group], levels))
        _, scale, steps, levels = min(found, key=lambda one: one[0])
        assert float(encoded.tensors["scales"][row, 0]) == scale
        assert encoded.tensors["steps"][row].tolist() == steps
        assert encoded.tensors["zeros"][row].tolist() == [point for _, point in fine]
        assert (codes[row] == torch.tensor(levels)).float().mean() > 0.97


def test_bits_that_there_are_not() -> None:
    with pytest.raises(SettingError, match="must be 4 or 2, got 3"):
        DualGrained(bits=3)
