"""What the decoder rebase promises beyond its kind's contract: its paper's widths, worked by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from deciding import several

from mixtura.methods.decoders._shared import widths
from mixtura.methods.decoders.rebase import Rebase


def by_the_paper(scores: list[float], width: int, balance: float) -> list[int]:
    """Widths as its code shares them out, best first."""
    weights = [math.exp(score / balance) for score in scores]
    shares = sorted((w / sum(weights) for w in weights), reverse=True)
    left, rest, found = width, 1.0, []
    for share in shares:
        number = min(left, math.ceil(round(left * share / rest, 9))) if left > 0 else 0
        found.append(number)
        left, rest = left - number, rest - share
    return found


@pytest.mark.parametrize("scores", [[0.9, 0.5, 0.1], [0.3] * 4, [1.0, 0.0], [0.2, 0.21, 0.22, 0.8], [0.5]])
def test_widths_are_the_papers_and_sum_to_the_width(scores: list[float]) -> None:
    made = Rebase(width=8)
    candidates = several("abcdefgh"[: len(scores)])
    for one, score in zip(candidates, scores, strict=True):
        one.verdicts = [score]
    counts = Counter(made.choose(candidates))
    assert sum(counts.values()) == 8
    assert sorted(counts.values(), reverse=True) == [n for n in by_the_paper(scores, 8, 0.2) if n]
    assert counts.most_common(1)[0][0] == scores.index(max(scores))


def test_equal_scores_spread_evenly_and_finished_answers_take_a_place() -> None:
    assert widths([0.25] * 4, 16) == [4] * 4
    candidates = several("abc", verdicts=[0.5])
    candidates[1].finished = True
    assert Rebase(width=5).choose(candidates) == [1, 0, 0, 2, 2]


def test_answers_are_scored_by_their_steps() -> None:
    first, second = several(["x", "y"])
    first.verdicts, second.verdicts = [0.9, 0.5], [0.2, 0.8]
    chosen = {name: Rebase(reduce=name).select([first, second]) for name in ("last", "min", "mean", "prod")}  # type: ignore[arg-type]
    assert chosen == {"last": 1, "min": 0, "mean": 0, "prod": 0}


def test_long_steps_are_cut_and_depth_ends_them() -> None:
    (one,) = several(["abcdef"])
    assert Rebase(step_tokens=6).ends_step(one)
    assert not Rebase(step_tokens=7).ends_step(one)
    assert not Rebase(step_tokens=6, depth=0).ends_step(one)
