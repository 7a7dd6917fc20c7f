"""What this machine can do, measured in a second or two: the base of every prediction."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

import torch

from mixtura.fitting.records import QUANTIZER, WIDTHS
from mixtura.methods import create

_MATRIX = 1024
_READ_BYTES = 64 * 2**20


@final
@dataclass(frozen=True, slots=True)
class Machine:
    """Speeds of this machine, each measured.

    Attributes:
        matmul_flops: multiply-adds of a square matrix product in bfloat16, times two, per second.
        read_bytes: bytes of weights a one-row product reads per second.
        disk_bytes: bytes read from the model's files per second, past the page cache where possible.
        encode_weights: weights encoded per second, by bits.
        decode_weights: weights decoded per second, by bits.
    """

    matmul_flops: float
    read_bytes: float
    disk_bytes: float
    encode_weights: dict[int, float]
    decode_weights: dict[int, float]


def measure_machine(shard: Path) -> Machine:
    """Measure this machine; `shard` is a file of the model, to read from."""
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(_MATRIX, _MATRIX, generator=generator).bfloat16()
    row = square[:1]
    # Larger than any cache, so that a one-row product reads memory.
    large = square.repeat(32, 1)
    encode, decode = {}, {}
    for bits in WIDTHS:
        quantizer = create("quantizers", QUANTIZER, bits=bits)
        encoded = quantizer.encode(square)
        encode[bits] = square.numel() / _best(partial(quantizer.encode, square), 2)
        decode[bits] = square.numel() / _best(partial(quantizer.decode, encoded, torch.bfloat16), 3)
    return Machine(
        matmul_flops=2 * _MATRIX**3 / _best(lambda: square @ square, 5),
        read_bytes=large.nbytes / _best(lambda: torch.nn.functional.linear(row, large), 3),
        disk_bytes=_disk_speed(shard),
        encode_weights=encode,
        decode_weights=decode,
    )


def _best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of a few runs, after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _disk_speed(shard: Path) -> float:
    size = min(shard.stat().st_size, _READ_BYTES)
    with shard.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        left = size
        while left > 0 and (piece := file.read(min(left, 2**22))):
            left -= len(piece)
        return max(size, 1) / max(time.perf_counter() - start, 1e-9)
