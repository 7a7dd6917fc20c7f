"""What the quantizer nested promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods.quantizers import Encoded
from mixtura.methods.quantizers.nested import Nested
from mixtura.methods.quantizers.round_to_nearest import RoundToNearest

WIDTHS = (8, 4, 2)


def normal(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def read_at(encoded: Encoded, bits: int) -> Encoded:
    """What reading at so many bits touches."""
    return Encoded({name: encoded.tensors[name] for name in Nested().widths[bits]}, encoded.meta)


def lost(weight: Tensor, back: Tensor) -> float:
    return float((back - weight).norm() / weight.norm())


def codes_of(encoded: Encoded, cols: int) -> Tensor:
    """The codes of eight bits, by hand."""
    upper, middle, (even, odd) = (encoded.tensors[name].int() for name in ("codes_2", "codes_4", "codes_8"))
    columns = []
    for c in range(cols):
        low = (odd if c % 2 else even)[:, c // 4] >> (4 * (c % 4 // 2)) & 15
        pair = [plane[:, c // 4] >> 2 * (c % 4) & 3 for plane in (upper, middle)]
        columns.append(64 * pair[0] + 16 * pair[1] + low)
    return torch.stack(columns, dim=1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=st.integers(1, 9), cols=st.integers(1, 150), group=st.integers(1, 80), seed=st.integers(0, 99))
def test_narrower_codes_are_the_upper_bits(rows: int, cols: int, group: int, seed: int) -> None:
    encoded = Nested(group_size=group).encode(normal(rows, cols, seed))
    codes = codes_of(encoded, cols)
    groups = torch.arange(cols) // min(group, cols)
    for bits in WIDTHS:
        levels = (codes >> (8 - bits)) - (2**bits - 1) / 2
        scales = encoded.tensors[f"scales_{bits}"].float()[:, groups]
        back = Nested(group_size=group).decode(read_at(encoded, bits))
        torch.testing.assert_close(back, levels * scales, rtol=0, atol=0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(weights=st.lists(st.floats(-1, 1, width=16), min_size=4, max_size=40))
def test_a_narrower_code_is_the_nearest_one(weights: list[float]) -> None:
    # The range is one group's: 255 steps of 2 / 255.
    weight = torch.tensor([[1.0, -1.0, *weights]])
    encoded = Nested(group_size=64).encode(weight)
    codes, finest = codes_of(encoded, weight.shape[1]), encoded.tensors["scales_8"].float()
    for bits in WIDTHS:
        step = finest * 2 ** (8 - bits)
        levels = (codes >> (8 - bits)) - (2**bits - 1) / 2
        # Half a step and, for the code of 8 bits that was rounded first, half of its own.
        within = (levels * step - weight).abs() <= step / 2 + finest / 2 + 1e-6
        assert within.all()


# As measured; round_to_nearest with the same groups has 0.0083 (one scale a row), 0.0943 and 0.3367.
@pytest.mark.parametrize(("bits", "expected"), [(8, 0.00594), (4, 0.0959), (2, 0.3674)])
def test_error_on_normal_weights(bits: int, expected: float) -> None:
    weight = normal(1024, 2048)
    back = Nested().decode(read_at(Nested().encode(weight), bits))
    assert lost(weight, back) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("bits", "most"), [(4, 1.03), (2, 1.12)])
def test_what_one_copy_for_all_widths_costs(bits: int, most: float) -> None:
    weight = normal(256, 1024)
    plain = RoundToNearest(bits=bits)
    back = Nested().decode(read_at(Nested().encode(weight), bits))
    assert lost(weight, back) <= most * lost(weight, plain.decode(plain.encode(weight)))


@pytest.mark.parametrize("bits", WIDTHS)
def test_stored_narrower_it_is_the_upper_part_of_the_whole(bits: int) -> None:
    weight = normal(7, 90)
    whole, narrow = Nested().encode(weight), Nested(bits=bits).encode(weight)
    assert set(Nested(bits=bits).widths) == {width for width in WIDTHS if width <= bits}
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in narrow.tensors.items())
    assert torch.equal(Nested(bits=bits).decode(narrow), Nested().decode(read_at(whole, bits)))


@pytest.mark.parametrize(
    ("bits", "rows", "cols", "expected"),
    [
        (8, 3, 128, 3 * (128 + 3 * 4)),
        (4, 3, 128, 3 * (64 + 2 * 4)),
        (2, 3, 128, 3 * (32 + 4)),
        (8, 2, 65, 2 * (4 * 17 + 3 * 4)),
    ],
)
def test_bytes_by_hand(bits: int, rows: int, cols: int, expected: int) -> None:
    assert Nested(bits=bits).num_bytes(rows, cols) == expected


def test_a_width_reads_its_share_of_the_codes() -> None:
    encoded = Nested().encode(normal(8, 256))
    scales = 8 * 4 * 2
    assert [read_at(encoded, bits).num_bytes - scales for bits in WIDTHS] == [8 * 256, 8 * 128, 8 * 64]


def test_rows_do_not_depend_on_each_other() -> None:
    # More than one chunk of rows.
    weight = normal(300, 1024)
    whole = Nested().decode(Nested().encode(weight))
    assert torch.equal(whole[257:260], Nested().decode(Nested().encode(weight[257:260])))


@pytest.mark.parametrize("bits", WIDTHS)
def test_decoding_in_bfloat16_rounds_once(bits: int) -> None:
    encoded = read_at(Nested().encode(normal(16, 130)), bits)
    exact = Nested().decode(encoded, torch.float32)
    assert torch.equal(Nested().decode(encoded, torch.bfloat16), exact.to(torch.bfloat16))


@pytest.mark.parametrize("bits", [0, 3, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(SettingError, match=f"bits of Nested must be 8, 4 or 2, got {bits}"):
        Nested(bits=bits)
