"""What the quantizer trellis promises beyond its kind's contract."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods._codebooks import codebook
from mixtura.methods._trellis import Columns, new_bits, ring_of, search_plainly, windows_of
from mixtura.methods.quantizers.trellis import Trellis

BITS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6)


def normal(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def window_by_hand(ring: list[int], row: int) -> int:
    """The eight bits of a ring of bytes that end where the row's own bits do."""
    bits = [byte >> place & 1 for byte in ring for place in range(8)]
    end = (row + 1) * len(ring) // 8
    return sum(bits[(end - 8 + i) % len(bits)] << i for i in range(8))


@pytest.mark.parametrize("bits", BITS)
def test_windows_are_eight_bits_of_the_ring(bits: float) -> None:
    codes = torch.randint(
        0, 256, (3, int(8 * bits)), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    found = windows_of(codes)
    for ring, windows in zip(codes.tolist(), found.tolist(), strict=True):
        assert windows == [window_by_hand(ring, row) for row in range(64)]
    # The bits of windows that follow each other are the ring again.
    assert torch.equal(ring_of(found, int(8 * bits)), codes)


@pytest.mark.parametrize("bits", BITS)
def test_decoding_by_hand(bits: float) -> None:
    weight = normal(70, 40)
    quantizer = Trellis(bits=bits, group_size=16)
    encoded = quantizer.encode(weight)
    back = quantizer.decode(encoded)
    table, codes, scales = (
        codebook(int(8 * bits))[0].tolist(),
        encoded.tensors["codes"],
        encoded.tensors["scales"],
    )
    for row, col in ((0, 0), (1, 39), (63, 16), (64, 15), (69, 33)):
        window = window_by_hand(codes[row // 64, col].tolist(), row % 64)
        assert float(back[row, col]) == table[window] * float(scales[row // 64, col // 16, row % 64])


def exhaustive(weights: list[float], table: list[int], ways: int) -> float:
    """The least squared error over every path of a short stretch, whatever window it begins with."""
    least = float("inf")
    bits = ways.bit_length() - 1
    for start in range(256):
        for path in itertools.product(range(ways), repeat=len(weights)):
            window, cost = start, 0.0
            for weight, added in zip(weights, path, strict=True):
                window = window >> bits | added << (8 - bits)
                cost += (weight - table[window]) ** 2
            least = min(least, cost)
    return least


def test_the_path_found_is_the_best_of_all() -> None:
    # All but the last rows have no scale, so that they cost nothing and the ring closes anywhere.
    table = codebook(16)[0]
    weights = normal(1, 4, seed=3)[0] * 40
    column = torch.zeros(1, 64)
    scales = torch.zeros(1, 64)
    column[0, 20:24], scales[0, 20:24] = weights, 1.0
    left = search_plainly(Columns(column, column, scales, torch.eye(1), 16, table)).left
    found = float(left[0, 20:24].square().sum())
    assert found == pytest.approx(exhaustive(weights.tolist(), table.tolist(), 4), rel=1e-5)


# Measured; Lloyd and Max's best levels for one weight alone leave 0.1175, 0.0345 and 0.0095, and no code less
# than 0.0625, 0.0156 and 0.0039.
@pytest.mark.parametrize(("bits", "most"), [(2, 0.083), (3, 0.0225), (4, 0.0062)])
def test_error_on_normal_weights(bits: float, most: float) -> None:
    weight = normal(256, 128)
    quantizer = Trellis(bits=bits)
    assert float((quantizer.decode(quantizer.encode(weight)) - weight).square().mean()) < most


def lost(weight: Tensor, back: Tensor, moments: Tensor) -> float:
    """Squared error of the outputs, as a share of the outputs."""
    off = back - weight
    return float(((off @ moments) * off).sum() / ((weight @ moments) * weight).sum())


@pytest.mark.parametrize("bits", [2, 4])
def test_moments_save_outputs(bits: float) -> None:
    weight, inputs = normal(64, 96), normal(400, 24, seed=1) @ normal(24, 96, seed=2)
    moments = inputs.T @ inputs
    quantizer = Trellis(bits=bits, group_size=32)
    blind = lost(weight, quantizer.decode(quantizer.encode(weight)), moments)
    aware = lost(weight, quantizer.decode(quantizer.encode(weight, moments)), moments)
    # Inputs of 24 dimensions in 96 leave much room to put errors where they are not felt.
    assert aware < 0.25 * blind


def test_bits_add_up() -> None:
    assert new_bits(20)[:4] == [2, 3, 2, 3]
    assert all(sum(new_bits(int(8 * bits))) == 64 * bits for bits in BITS)


@pytest.mark.parametrize(
    ("bits", "rows", "cols", "expected"),
    [(2, 64, 256, 256 * 16 + 128), (3, 65, 258, 2 * (258 * 24 + 2 * 128)), (2.5, 1, 1, 20 + 128)],
)
def test_bytes_by_hand(bits: float, rows: int, cols: int, expected: int) -> None:
    assert Trellis(bits=bits).num_bytes(rows, cols) == expected


@pytest.mark.parametrize("bits", [0, 0.5, 2.25, 7, 8])
def test_other_bits_are_refused(bits: float) -> None:
    with pytest.raises(SettingError, match=r"bits of Trellis must be one of 1, 1\.5, 2"):
        Trellis(bits=bits)
