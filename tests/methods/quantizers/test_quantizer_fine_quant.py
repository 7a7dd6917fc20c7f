"""What the quantizer fine_quant promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods.quantizers.fine_quant import FineQuant
from mixtura.methods.quantizers.round_to_nearest import RoundToNearest


def normal(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def with_outliers(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Every fourth row has a few weights of twenty times the size, side by side."""
    weight = normal(rows, cols, seed)
    weight[::4, :6] *= 20
    return weight


def by_a_loop(weight: Tensor, group: int, ratio: float) -> list[int]:
    """Halve one row at a time, looking at all of them each time."""
    rows, cols = weight.shape

    def size(halvings: int) -> int:
        return math.ceil(cols / 2**halvings)

    def groups(row: int, halvings: int) -> list[Tensor]:
        return list(torch.split(weight[row], size(halvings)))

    def mean_range(row: int, halvings: int) -> float:
        return sum(float(one.abs().max()) * len(one) for one in groups(row, halvings)) / cols

    found, left = [0] * rows, rows * (math.ceil(cols / group) - 1)
    stuck: set[int] = set()
    while True:
        gains = {
            row: mean_range(row, own) / mean_range(row, own + 1)
            for row, own in enumerate(found)
            if row not in stuck and size(own) > 8
        }
        gains = {row: gain for row, gain in gains.items() if gain > ratio}
        if not gains or left <= 0:
            return found
        row = max(gains, key=lambda one: gains[one])
        more = len(groups(row, found[row] + 1)) - len(groups(row, found[row]))
        if more > left:
            stuck.add(row)
            continue
        left -= more
        found[row] += 1


@pytest.mark.parametrize(("cols", "group"), [(128, 32), (100, 16), (70, 64), (24, 8)])
@pytest.mark.parametrize("ratio", [1.0, 1.05, 1.5])
def test_groups_are_those_of_a_loop(cols: int, group: int, ratio: float) -> None:
    weight = with_outliers(12, cols, seed=cols)
    encoded = FineQuant(group_size=group, ratio=ratio).encode(weight)
    assert encoded.tensors["halvings"].tolist() == by_a_loop(weight, group, ratio)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_weight_has_the_nearest_level_of_its_group(bits: int) -> None:
    weight = with_outliers(8, 90)
    quantizer = FineQuant(bits=bits, group_size=16)
    encoded = quantizer.encode(weight)
    back, half, place = quantizer.decode(encoded), (2**bits - 1) / 2, 0
    for row, halvings in enumerate(encoded.tensors["halvings"].tolist()):
        for own, found in zip(
            torch.split(weight[row], math.ceil(90 / 2**halvings)),
            torch.split(back[row], math.ceil(90 / 2**halvings)),
            strict=True,
        ):
            levels = (torch.arange(2**bits) - half) * float(encoded.tensors["scales"][place])
            nearest = levels[(own[:, None] - levels).abs().argmin(1)]
            torch.testing.assert_close((found - own).abs(), (nearest - own).abs(), rtol=1e-4, atol=1e-5)
            place += 1
    assert place <= len(encoded.tensors["scales"])
    assert not encoded.tensors["scales"][place:].any()


def test_rows_with_outliers_have_the_scales_and_lose_less_for_it() -> None:
    weight = with_outliers(64, 256)
    fine, even = FineQuant(group_size=64), RoundToNearest(group_size=64)
    encoded = fine.encode(weight)
    halvings = encoded.tensors["halvings"]
    assert int(halvings[::4].min()) > int(halvings[1::4].max())
    # One byte a row more.
    assert fine.num_bytes(64, 256) - even.num_bytes(64, 256) == 64
    lost = [float((one.decode(one.encode(weight)) - weight).square().sum()) for one in (fine, even)]
    assert lost[0] < 0.6 * lost[1]


def test_calm_rows_are_left_whole() -> None:
    weight = 0.1 + 0.001 * normal(16, 128)
    assert not FineQuant().encode(weight).tensors["halvings"].any()


def test_settings() -> None:
    with pytest.raises(SettingError, match="must be 8, 4 or 2, got 3"):
        FineQuant(bits=3)
    with pytest.raises(SettingError, match="ratio"):
        FineQuant(ratio=0.5)
    with pytest.raises(SettingError, match="ratio"):
        FineQuant(ratio=float("nan"))
