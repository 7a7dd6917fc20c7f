"""What the quantizer integers promises beyond its kind's contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mixtura.methods.quantizers._shared import pack_words, unpack_words
from mixtura.methods.quantizers.integers import Integers


def normal(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_lie_as_compressed_tensors_has_them(bits: int) -> None:
    helpers: Any = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="it is in mixtura[compressed-tensors]"
    )
    codes = torch.randint(0, 2**bits, (3, 77), generator=torch.Generator().manual_seed(bits))
    packed = pack_words(codes.to(torch.uint8), bits)
    assert torch.equal(packed, helpers.pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits))
    assert torch.equal(unpack_words(packed, bits, 77), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_bits_by_a_loop(bits: int) -> None:
    """Bit by bit: code i has the bits from i * bits on, the lowest first."""
    codes = torch.randint(0, 2**bits, (2, 13), generator=torch.Generator().manual_seed(bits))
    words = pack_words(codes.to(torch.uint8), bits)
    for row in range(2):
        whole = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words[row]))
        assert [whole >> (place * bits) & (2**bits - 1) for place in range(13)] == codes[row].tolist()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_weight_has_its_nearest_level_and_no_group_a_worse_scale(bits: int) -> None:
    weight, group = normal(4, 50), 16
    quantizer = Integers(bits=bits, group_size=group)
    encoded = quantizer.encode(weight)
    back, low = quantizer.decode(encoded), 2 ** (bits - 1)
    for row in range(4):
        for start in range(0, 50, group):
            own = weight[row, start : start + group]
            scale = float(encoded.tensors["scales"][row, start // group])
            levels = torch.arange(-low, low) * scale
            nearest = levels[(own[:, None] - levels).abs().argmin(1)]
            off = (back[row, start : start + group] - own).abs()
            assert bool((off <= (nearest - own).abs() + 1e-6).all())
            # Not worse than the plain rule: the largest weight is the lowest level, but for the scale's bits.
            plain = float(own.abs().max()) / low
            rounded = (own / plain).round().clamp(-low, low - 1) * plain
            lost = float((nearest - own).square().sum())
            of_scale = float((own * 2.0**-8).square().sum())
            assert lost <= float((rounded - own).square().sum()) + of_scale


def test_feedback_is_that_of_removing_columns_one_by_one() -> None:
    """The recursion as optimal brain surgery states it: the inverse shrinks by a column each time."""
    weight, inputs = normal(5, 40), normal(200, 12, seed=1) @ normal(12, 40, seed=2)
    moments = inputs.T @ inputs + 0.1 * torch.eye(40)
    quantizer = Integers(bits=4, group_size=8)
    scales = quantizer._scales(weight, moments.diagonal()).to(torch.bfloat16).double()
    damped = (moments + 0.01 * moments.diagonal().mean() * torch.eye(40)).double()
    inverse, now = torch.linalg.inv(damped), weight.double().clone()
    wanted, left = torch.zeros_like(now), list(range(40))
    for column in torch.argsort(moments.diagonal(), descending=True, stable=True).tolist():
        at, scale = left.index(column), scales[:, column // 8]
        wanted[:, column] = (now[:, column] / scale).round().clamp(-8, 7)
        error = (now[:, column] - wanted[:, column] * scale) / inverse[at, at]
        for place, other in enumerate(left):
            now[:, other] -= error * inverse[at, place]
        inverse = inverse - inverse[:, at, None] * inverse[None, at] / inverse[at, at]
        keep = [place for place in range(len(left)) if place != at]
        inverse, left = inverse[keep][:, keep], [left[place] for place in keep]
    levels = unpack_words(quantizer.encode(weight, moments).tensors["packed"], 4, 40).double() - 8
    assert (levels == wanted).double().mean() > 0.99


def test_a_scale_a_row() -> None:
    encoded = Integers(bits=8, group_size=0).encode(normal(3, 200))
    assert encoded.tensors["scales"].shape == (3, 1)
