"""Paths through a trellis: how a column's weights become a ring of bits, and the weights again.

A strip is 64 rows of a matrix. Of each strip a column is a ring of ``8 * rate`` bits. The window of row i is
the eight bits that end at bit ``(i + 1) * rate // 8`` (the lowest bit first), so that neighbouring windows
share most of their bits, and a table turns each window into a level.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

ROWS = 64
NUM_WINDOWS = 256
# Rows on either side of where a ring is closed that are looked at to choose the window there.
SEAM = 8
_FORBIDDEN = 1e30


class Columns(NamedTuple):
    """Columns to be rounded, one after the other.

    Attributes:
        weights: the columns as rows, with what columns before these handed on.
        originals: without.
        scales: of each weight.
        factor: what is left of column c goes on to column k times ``factor[c, k]``.
        rate: bits of eight weights.
        table: the level of each window.
    """

    weights: Float[Tensor, "n R"]
    originals: Float[Tensor, "n R"]
    scales: Float[Tensor, "n R"]
    factor: Float[Tensor, "n n"]
    rate: int
    table: Int8[Tensor, " 256"]


@final
class Searched(NamedTuple):
    """What a search finds.

    Attributes:
        codes: the ring of each column and strip.
        left: what each weight is off from its original.
    """

    codes: UInt8[Tensor, "n B rate"]
    left: Float[Tensor, "n R"]


# Finds the path of least squared error for every column and strip, one column after the other, and hands on
# to ``columns.weights`` what each is off; their number of rows is a multiple of 64.
Search = Callable[[Columns], Searched]


def new_bits(rate: int) -> list[int]:
    """Bits by which each row's window moves on.

    >>> new_bits(20)[:8]
    [2, 3, 2, 3, 2, 3, 2, 3]
    """
    return [(row + 1) * rate // 8 - row * rate // 8 for row in range(ROWS)]


def search_plainly(columns: Columns) -> Searched:
    """The search by PyTorch's operators: for machines without compiled kernels, and to compare them with."""
    weights, originals, scales, factor, rate, table = columns
    num_columns, rows = weights.shape
    codes, left = [], torch.empty_like(weights)
    levels = table.float()
    for c in range(num_columns):
        windows = _best_windows(weights[c].view(-1, ROWS), scales[c].view(-1, ROWS), rate, levels)
        codes.append(ring_of(windows, rate))
        left[c] = originals[c] - levels[windows].view(rows) * scales[c]
        weights[c + 1 :] += factor[c, c + 1 :, None] * left[c]
    return Searched(torch.stack(codes), left)


class Stored(NamedTuple):
    """A matrix as it is stored.

    Attributes:
        codes: the ring of each strip and column.
        scales: in bfloat16, of each row and every ``group`` columns.
        rows: of the matrix; the last strip may have more.
        group: columns that share a scale.
        table: the level of each window.
    """

    codes: UInt8[Tensor, "B C rate"]
    scales: Float[Tensor, "B G 64"]
    rows: int
    group: int
    table: Int8[Tensor, " 256"]


# Gives a matrix back, each number rounded once.
Decode = Callable[[Stored, torch.dtype], Tensor]


def decode_plainly(stored: Stored, dtype: torch.dtype) -> Float[Tensor, "R C"]:
    """The matrix by PyTorch's operators."""
    codes, scales, rows, group, table = stored
    cols = codes.shape[1]
    # Levels are exact in bfloat16, and their product with a scale is rounded once.
    exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    levels = table.to(exact)[windows_of(codes)]
    spread = scales.to(exact).repeat_interleave(group, dim=1)[:, :cols]
    return levels.mul_(spread).transpose(1, 2).reshape(-1, cols)[:rows].to(dtype)


_search: list[Search] = [search_plainly]
_decode: list[Decode] = [decode_plainly]


def use_compiled(search: Search, decode: Decode) -> None:
    """Search and decode with these from now on: the compiled kernels put theirs here."""
    _search[0], _decode[0] = search, decode


def search(columns: Columns) -> Searched:
    """Round columns by the fastest search there is."""
    return _search[0](columns)


def decode(stored: Stored, dtype: torch.dtype) -> Float[Tensor, "R C"]:
    """The matrix by the fastest way there is."""
    return _decode[0](stored, dtype)


def levels_of(codes: UInt8[Tensor, "B C rate"], table: Int8[Tensor, " 256"]) -> Float[Tensor, "R C"]:
    """The levels of all strips' rows, before they are scaled, in bfloat16, which holds them exactly."""
    strips, cols, _ = codes.shape
    ones = torch.ones(strips, 1, ROWS, dtype=torch.bfloat16)
    return decode(Stored(codes, ones, strips * ROWS, cols, table), torch.bfloat16)


def ring_of(windows: Int[Tensor, "B 64"], rate: int) -> UInt8[Tensor, "B rate"]:
    """The bits of windows that follow each other."""
    bits = torch.zeros(windows.shape[0], 8 * rate, dtype=torch.uint8)
    for row, added in enumerate(new_bits(rate)):
        end = (row + 1) * rate // 8
        for bit in range(added):
            bits[:, end - added + bit] = (windows[:, row] >> (8 - added + bit) & 1).to(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8)
    return (bits.view(-1, rate, 8) << shifts).sum(-1, dtype=torch.uint8)


def windows_of(codes: UInt8[Tensor, "*A rate"]) -> Int[Tensor, "*A 64"]:
    """The windows in rings of bits."""
    byte, following, shift = _places(codes.shape[-1])
    words = codes.to(torch.int32)
    return (words[..., byte] | words[..., following] << 8) >> shift & 255


@cache
def _places(rate: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the bytes that its window begins and may end in, and the bit it begins at."""
    first = torch.tensor([(row + 1) * rate // 8 - 8 for row in range(ROWS)])
    byte = first.div(8, rounding_mode="floor") % rate
    return byte, (byte + 1) % rate, first % 8


def _best_windows(
    weights: Float[Tensor, "B 64"], scales: Float[Tensor, "B 64"], rate: int, levels: Float[Tensor, " 256"]
) -> Int[Tensor, "B 64"]:
    """The windows of least squared error that close into a ring."""
    seam = torch.arange(ROWS - SEAM, ROWS + SEAM) % ROWS
    free = torch.zeros(weights.shape[0], NUM_WINDOWS)
    costs, ways = _forward(free, weights[:, seam], scales[:, seam], rate, levels, seam.tolist())
    closing = _back(costs.argmin(-1), ways, rate, seam.tolist())[:, SEAM - 1]
    start = torch.full_like(free, _FORBIDDEN).scatter_(1, closing[:, None], 0.0)
    rows = list(range(ROWS))
    _, ways = _forward(start, weights, scales, rate, levels, rows)
    return _back(closing, ways, rate, rows)


def _forward(
    costs: Tensor, weights: Tensor, scales: Tensor, rate: int, levels: Tensor, rows: list[int]
) -> tuple[Tensor, list[Tensor]]:
    """The least cost of arriving at each window, and for every row the bits that fell out on the way."""
    ways = []
    for place, row in enumerate(rows):
        bits = new_bits(rate)[row]
        least, way = costs.view(len(costs), -1, 1 << bits).min(-1)
        ways.append(way)
        off = weights[:, place, None] - scales[:, place, None] * levels
        costs = off * off + least.repeat(1, 1 << bits)
    return costs, ways


def _back(windows: Tensor, ways: list[Tensor], rate: int, rows: list[int]) -> Tensor:
    """The windows of the best path to those at the end."""
    path = []
    for way, row in zip(reversed(ways), reversed(rows), strict=True):
        path.append(windows)
        bits = new_bits(rate)[row]
        end = windows & ((NUM_WINDOWS >> bits) - 1)
        windows = end << bits | way.gather(1, end[:, None]).squeeze(1)
    return torch.stack(path[::-1], dim=1)
