"""How much a fit to a GGUF file measures: all of it where the time allows, less where the model is large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch

from mixtura.checkpoints.gguf.libraries import encode, llama_library
from mixtura.checkpoints.gguf.types import storage_type
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.fitting.depth import Depth, Work, shortened
from mixtura.fitting.forms.gguf.pricing import SAMPLED_WEIGHTS
from mixtura.fitting.forms.gguf.units import PALETTE, Unit, sizes_of
from mixtura.fitting.pace import best_of, measure_pace
from mixtura.fitting.texts import Texts
from mixtura.kernels.compiled import num_threads

MOST_BLOCKS = 64
# From most to least: calibration tokens, held-out tokens, blocks of tensors, types.
_LESS = (
    (8192, 8192, 24, len(PALETTE.stored)),
    (8192, 4096, 24, 10),
    (8192, 4096, 1, 8),
    (4096, 2048, 1, 6),
    (2048, 1024, 1, 4),
    (1024, 512, 1, 4),
)
# Candidates besides one for each block: the plain plan, mixtures by the blocks' prices, some moves.
_CANDIDATES, _CAUTION = 8, 1.3
# Every tensor is rounded in about so many types before a search is over.
_ROUNDINGS = 3
_TIMED_ROWS = 256


@final
@dataclass(frozen=True, slots=True)
class FileDepth:
    """How much is measured.

    Attributes:
        calibration_tokens: tokens the model is observed on; None for all there are.
        held_out_tokens: tokens candidates are judged by; None for all there are.
        blocks: blocks of tensors whose loss is measured, but for one of every kind of tensor.
        options: of `PALETTE`, which types are tried.
    """

    calibration_tokens: int | None = None
    held_out_tokens: int | None = None
    blocks: int = MOST_BLOCKS
    options: tuple[int, ...] = PALETTE.stored

    @property
    def of_text(self) -> Depth:
        """How much text."""
        return Depth(self.calibration_tokens, self.held_out_tokens)

    @property
    def is_full(self) -> bool:
        """Whether nothing is left out."""
        return self == FileDepth()

    @property
    def told(self) -> str:
        """What is left out, as the end of a sentence."""
        names = ", ".join(PALETTE.names[option] for option in self.options)
        return (
            f"types are {names}, the model is observed on about {self.calibration_tokens} tokens, candidates "
            f"are judged on {self.held_out_tokens}, and tensors of a kind share a price"
        )


@final
@dataclass(frozen=True, slots=True)
class FileWork:
    """Seconds that the steps of a fit to a file are predicted to take on this machine.

    Attributes:
        work: what running the model takes.
        units: what gets types.
        encode_s: for each weight that is rounded, on one thread.
    """

    work: Work
    units: Sequence[Unit]
    encode_s: float

    @staticmethod
    def timed(view: CheckpointView, units: Sequence[Unit]) -> FileWork:
        """Run a layer of the model, and llama.cpp's quantizers where they are installed, for a moment."""
        encode_s = 0.0 if llama_library() is None else _encode_seconds()
        return FileWork(Work(view, measure_pace(view, ())), units, encode_s)

    def passes(self, blocks: int, count: int) -> int:
        """Candidates that are judged: of the blocks, mixtures, and every type where none is left out."""
        kinds = len({unit.kind for unit in self.units})
        return _CANDIDATES + max(blocks, kinds) + (count if count == len(PALETTE.stored) else 0)

    def needed_s(self, texts: Texts, blocks: int, count: int) -> float:
        """Observing and searching with so much text, so many blocks of tensors and so many types."""
        weights = sum(math.prod(tensor.shape) for unit in self.units for tensor in unit.tensors)
        seconds = self.work.pass_s(texts.calibration)
        seconds += self.work.pass_s(texts.held_out) * (1 + self.passes(blocks, count))
        sampled = len(self.units) * count * SAMPLED_WEIGHTS
        return seconds + self.encode_s * (sampled + _ROUNDINGS * weights / num_threads())


def choose_file_depth(work: FileWork, texts: Texts, time_s: float, budget_bytes: int) -> FileDepth:
    """The most that is predicted to fit the time, or the least there is.

    Args:
        work: what steps take.
        texts: in full.
        time_s: for observing and searching.
        budget_bytes: what the units may take: types near it are tried first.
    """
    near = options_near(work.units, budget_bytes)
    for calibration, held_out, blocks, count in ((None, None, MOST_BLOCKS, len(near)), *_LESS):
        depth = FileDepth(calibration, held_out, blocks, tuple(sorted(near[:count])))
        cut = shortened(texts, depth.of_text)
        if _CAUTION * work.needed_s(cut, blocks, count) <= time_s:
            break
    return depth


def options_near(units: Sequence[Unit], budget_bytes: int) -> tuple[int, ...]:
    """All types, those first that a mixture for a budget is made of; the smallest is among the first four."""
    sizes = sizes_of(units).sum(0)
    stored = list(PALETTE.stored)
    order = sorted(stored, key=lambda option: abs(float(sizes[option]) - budget_bytes))
    smallest = min(stored, key=lambda option: (int(sizes[option]), option))
    first = [*order[:3], smallest]
    return tuple(dict.fromkeys([*first, *order]))


def _encode_seconds() -> float:
    """Seconds for a weight, on one thread, over types of several kinds."""
    rows = torch.randn(_TIMED_ROWS, 256, generator=torch.Generator().manual_seed(0))
    names = ("q8_0", "q4_k", "q2_k", "iq3_s", "iq2_xs")
    kinds = [storage_type(name) for name in names]
    for kind in kinds:
        # The library makes a type's tables when it is first used.
        encode(rows[:1], kind, torch.ones(256))
    seconds = sum(best_of(partial(encode, rows, kind, torch.ones(256)), 2) for kind in kinds)
    return seconds / len(kinds) / rows.numel()
