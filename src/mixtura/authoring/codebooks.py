"""Fits the tables of trellises to normal weights; ``python -m mixtura.authoring.codebooks`` writes them."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
from jaxtyping import Float, Int8
from torch import Tensor

import mixtura.kernels.coding  # noqa: F401 - searches are compiled then
from mixtura.methods import _codebooks
from mixtura.methods._trellis import NUM_WINDOWS, Columns, search, windows_of

RATES = (8, 12, 16, 20, 24, 28, 32, 40, 48)
_COLUMNS, _ROWS = 256, 1024
_ROUNDS, _SEEDS = 60, 2
_MOST = 127

_HEADER = '''"""Tables of trellises by bits of eight weights, by ``python -m mixtura.authoring.codebooks``."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Int8
from torch import Tensor

# For each rate the standard deviation of weights that a table suits, and its 256 levels as bytes.
_TABLES = {
'''
_FOOTER = '''}


@cache
def codebook(rate: int) -> tuple[Int8[Tensor, " 256"], float]:
    """Levels of the windows, and the standard deviation of weights that they suit."""
    size, text = _TABLES[rate]
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.int8), size
'''


def fit_table(rate: int, seed: int, rounds: int = _ROUNDS) -> tuple[Int8[Tensor, " 256"], float, float]:
    """A table, the standard deviation that it suits, and its mean squared error on weights of 1.

    By turns weights are given windows and windows the mean of their weights, from levels in random order
    among those that follow the same window.
    """
    generator = torch.Generator().manual_seed(seed)
    levels = _first_levels(rate, generator)
    for number in range(rounds):
        size = float(_MOST / levels.abs().max())
        table = (levels * size).round().to(torch.int8)
        weights = torch.randn(_COLUMNS, _ROWS, generator=generator)
        windows, rounded = _coded(weights, table, size, rate)
        loss = float((weights - rounded).square().mean())
        if number + 1 < rounds:
            sums = torch.zeros(NUM_WINDOWS).index_add_(0, windows, weights.flatten())
            counts = torch.bincount(windows, minlength=NUM_WINDOWS)
            levels = torch.where(counts > 0, sums / counts.clamp(min=1), levels)
    return table, size, loss


def _coded(weights: Tensor, table: Tensor, size: float, rate: int) -> tuple[Tensor, Tensor]:
    scales = torch.full_like(weights, 1 / size)
    found = search(Columns(weights.clone(), weights, scales, torch.eye(len(weights)), rate, table))
    return windows_of(found.codes).reshape(-1).to(torch.int64), weights - found.left


def _first_levels(rate: int, generator: torch.Generator) -> Float[Tensor, " 256"]:
    """Quantiles of normal weights: the windows that follow one another have one from each part of them."""
    bits = max(1, rate // 8)
    ways, ends = 1 << bits, NUM_WINDOWS >> bits
    quantiles = torch.special.ndtri((torch.arange(NUM_WINDOWS) + 0.5) / NUM_WINDOWS)
    within = torch.randperm(ends, generator=generator)
    parts = torch.stack([torch.randperm(ways, generator=generator) for _ in range(ends)], dim=1)
    levels: Tensor = quantiles[parts * ends + within].flatten()
    return levels


def main() -> None:
    """Write the tables."""
    lines = []
    for rate in RATES:
        fits = [fit_table(rate, seed) for seed in range(_SEEDS)]
        table, size, loss = min(fits, key=lambda fit: fit[2])
        print(f"{rate / 8} bits: mean squared error {loss:.5f}, {[round(one[2], 5) for one in fits]}")
        pieces = textwrap.wrap(table.numpy().tobytes().hex(), 96)
        text = "\n".join(f'        "{piece}"' for piece in pieces)
        lines.append(f"    {rate}: (\n        {size:.4f},\n{text},\n    ),\n")
    Path(str(_codebooks.__file__)).write_text(_HEADER + "".join(lines) + _FOOTER, encoding="utf-8")


if __name__ == "__main__":
    main()
