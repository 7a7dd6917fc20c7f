"""What the quantizer round_to_nearest promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods.quantizers.round_to_nearest import RoundToNearest


def normal(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def plain(weight: Tensor, bits: int, group: int) -> Tensor:
    """Textbook rounding: the whole range as the scale, a level at zero."""
    grouped = weight.view(weight.shape[0], -1, group)
    top = 2 ** (bits - 1) - 1
    scale = grouped.abs().amax(-1, keepdim=True) / top
    return ((grouped / scale).round().clamp(-top, top) * scale).view(weight.shape)


def mean_squared_error(bits: int, group_size: int = 64) -> float:
    weight = normal(512, 1024)
    quantizer = RoundToNearest(bits=bits, group_size=group_size)
    return (quantizer.decode(quantizer.encode(weight)) - weight).square().mean().item()


# As measured when the ranges to try were chosen; eight bits have one scale for 1024 weights.
@pytest.mark.parametrize(("bits", "expected"), [(8, 6.16e-5), (4, 0.00886), (2, 0.1132)])
def test_error_on_normal_weights(bits: int, expected: float) -> None:
    assert mean_squared_error(bits) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.77), (2, 0.25)])
def test_error_beside_plain_rounding(bits: int, most: float) -> None:
    weight = normal(512, 1024)
    usual = (plain(weight, bits, 64) - weight).square().mean().item()
    assert mean_squared_error(bits) <= most * usual


def test_smaller_groups_lose_less_and_take_more() -> None:
    errors = [mean_squared_error(4, size) for size in (32, 64, 128)]
    assert errors == sorted(errors)
    sizes = [RoundToNearest(bits=4, group_size=size).num_bytes(1, 1024) for size in (32, 64, 128)]
    assert sizes == [512 + 64, 512 + 32, 512 + 16]


@pytest.mark.parametrize(
    ("bits", "rows", "cols", "expected"),
    [
        (8, 3, 100, 3 * (100 + 2)),
        (4, 3, 128, 3 * (64 + 4)),
        (2, 3, 128, 3 * (32 + 4)),
        (4, 2, 65, 2 * (33 + 4)),
    ],
)
def test_bytes_by_hand(bits: int, rows: int, cols: int, expected: int) -> None:
    assert RoundToNearest(bits=bits).num_bytes(rows, cols) == expected


def test_bits_per_weight_counts_the_scales() -> None:
    assert RoundToNearest(bits=4, group_size=64).bits_per_weight(10, 128) == 4.25


def test_codes_are_packed_from_the_lowest_bits() -> None:
    # A range of fifteen steps has each of the sixteen codes once, in order.
    weight = torch.arange(16.0)[None] - 7.5
    encoded = RoundToNearest(bits=4).encode(weight)
    assert encoded.tensors["codes"].tolist() == [[low + 16 * (low + 1) for low in range(0, 16, 2)]]
    assert encoded.tensors["scales"].tolist() == [[1.0]]
    assert torch.equal(RoundToNearest(bits=4).decode(encoded), weight)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_short_last_group_is_as_good_as_alone(bits: int) -> None:
    weight = normal(5, 70)
    quantizer = RoundToNearest(bits=bits)
    if bits < 8:
        alone = quantizer.decode(quantizer.encode(weight[:, 64:]))
        assert torch.equal(quantizer.decode(quantizer.encode(weight))[:, 64:], alone)
    assert quantizer.encode(weight).num_bytes == quantizer.num_bytes(5, 70)


def test_rows_do_not_depend_on_each_other() -> None:
    # More than one chunk of rows.
    weight = normal(300, 1024)
    quantizer = RoundToNearest(bits=4)
    whole = quantizer.decode(quantizer.encode(weight))
    assert torch.equal(whole[257:260], quantizer.decode(quantizer.encode(weight[257:260])))


def test_an_outlier_costs_its_own_group_alone() -> None:
    weight = normal(1, 256)
    spiked = weight.clone()
    spiked[0, 3] = 50
    quantizer = RoundToNearest(bits=4)
    before, after = (quantizer.decode(quantizer.encode(case)) for case in (weight, spiked))
    assert torch.equal(before[:, 64:], after[:, 64:])


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_decoding_in_bfloat16_rounds_once(bits: int) -> None:
    quantizer = RoundToNearest(bits=bits)
    encoded = quantizer.encode(normal(16, 130))
    exact = quantizer.decode(encoded, torch.float32)
    assert torch.equal(quantizer.decode(encoded, torch.bfloat16), exact.to(torch.bfloat16))


def test_transposed_weights_are_read_as_they_look() -> None:
    weight = normal(64, 48)
    quantizer = RoundToNearest(bits=4)
    straight = quantizer.encode(weight.T.contiguous())
    assert torch.equal(quantizer.encode(weight.T).tensors["codes"], straight.tensors["codes"])


@pytest.mark.parametrize("bits", [0, 3, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(SettingError, match=f"bits of RoundToNearest must be 8, 4 or 2, got {bits}"):
        RoundToNearest(bits=bits)
