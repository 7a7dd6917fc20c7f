"""The arena of quantizers as a whole: every measurement that is missing, then page, numbers and picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.data import specimen
from mixtura.errors import SettingError, check_range
from mixtura.fitting.arena.exam import Sizes
from mixtura.fitting.arena.measured import Notify
from mixtura.fitting.arena.rounding.entries import RUNGS, Entry, entries
from mixtura.fitting.arena.rounding.measured import RoundingExam
from mixtura.fitting.arena.rounding.page import markdown
from mixtura.fitting.arena.rounding.standings import Standing, standings
from mixtura.fitting.quality import ALL
from mixtura.running.composing.standings import as_csv
from mixtura.train.arena.plot import Point, scatter

NUM_TOKENS = 16_384
_HELD_OUT_TOKENS = 2048


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """What is to be run.

    Attributes:
        only: names of quantizers; all where empty.
        num_seeds: each has calibration and held-out text of its own.
        num_tokens: of each calibration text, in all domains together.
        model: a checkpoint; the specimen where None.
        sizes: how much held-out text is read.
        rungs: bits a weight may take.
        runs: where measurements are kept.
        out: where the page is written.
    """

    only: tuple[str, ...] = ()
    num_seeds: int = 3
    num_tokens: int = NUM_TOKENS
    model: Path | None = None
    sizes: Sizes = field(default_factory=lambda: Sizes(held_out_tokens=_HELD_OUT_TOKENS))
    rungs: tuple[float, ...] = RUNGS
    runs: Path = Path("build/arena")
    out: Path = Path("docs/arena")

    def __post_init__(self) -> None:
        check_range("the arena", "seeds", self.num_seeds, 1, 1000)
        if self.num_tokens < 64:
            raise SettingError(f"tokens of the arena must be at least 64, got {self.num_tokens:,}")


def hold(contest: Contest, notify: Notify) -> list[Standing]:
    """Measure what was not measured yet, and write the page, the numbers and the picture.

    A measurement is kept as soon as it is there; an arena that was stopped goes on where it was.

    Raises:
        UnknownNameError: a name is no quantizer.
        CheckpointError: the model cannot be read.
        UnsupportedModelError: it is one that mixtura cannot work on.
    """
    view = open_checkpoint(specimen.path() if contest.model is None else contest.model)
    taking_part = entries(contest.only, _sizes(view), contest.rungs)
    results: list[dict[str, Any]] = []
    for seed in range(contest.num_seeds):
        exam = RoundingExam(view.path, contest.runs / "quantizers", contest.sizes, contest.num_tokens, seed)
        for entry in taking_part:
            is_new = not exam.is_known(entry)
            row = _row(entry, seed, exam.measure(entry))
            if is_new:
                notify(f"seed {seed}, {entry.rung:g} bits, {entry.name} ({entry.said}): KL {row['kl']:.3g}")
            results.append(row)
    table = standings(results)
    _publish(contest, view, table)
    return table


def _sizes(view: CheckpointView) -> list[tuple[int, int]]:
    """Rows and columns of every expert's two matrices."""
    found = []
    for layer in view.layers:
        tensors = layer.native_expert(0)
        pair = [(m.mT if layer.layout.transposed else m).shape for m in (tensors.up, tensors.down)]
        found += [(rows, cols) for rows, cols in pair] * layer.num_experts
    return found


def _row(entry: Entry, seed: int, found: dict[str, Any]) -> dict[str, Any]:
    told = {"name": entry.name, "rung": entry.rung, "settings": entry.said, "seed": seed}
    return {**told, **found, "perplexity": found["perplexity"][ALL]}


def _publish(contest: Contest, view: CheckpointView, table: Sequence[Standing]) -> None:
    facts = {
        "model": "the specimen" if contest.model is None else f"`{contest.model.name}`",
        "layers": len(view.layers),
        "experts": max(layer.num_experts for layer in view.layers),
        "tokens": contest.num_tokens,
        "held_out": contest.sizes.held_out_tokens,
        "num_seeds": contest.num_seeds,
    }
    contest.out.mkdir(parents=True, exist_ok=True)
    page = contest.out / "quantizers.md"
    page.write_text(markdown(table, facts, "quantizers.svg"), encoding="utf-8")
    page.with_suffix(".csv").write_text(as_csv(table, ".6g"), encoding="utf-8")
    picture = scatter(
        [_point(one) for one in table],
        title=f"quantizers: KL against bits a weight, {contest.num_seeds} seeds",
        x_label="bits a weight, scales included",
        y_label="log10 of the KL to the original (lower is better)",
    )
    page.with_suffix(".svg").write_text(picture, encoding="utf-8")


def _point(one: Standing) -> Point:
    height = 0.0 if one.half_width is None else one.half_width / max(one.kl, 1e-9) / math.log(10)
    return Point(
        name=one.name,
        x=one.bits,
        y=math.log10(max(one.kl, 1e-9)),
        half_height=height,
        group=one.verdict,
        baseline=one.baseline,
    )
