"""What the aggregator xolver promises beyond its kind's contract."""

from __future__ import annotations

import pytest
from scripted_models import run

from mixtura.methods.aggregators.xolver import Xolver


def test_what_is_kept_never_gets_worse_and_calls_are_bounded() -> None:
    scores = iter([3, 7, 1, 0, 5, 2])
    attempts = iter("abcdef")
    seen: list[str] = []

    def says(text: str, ask: object) -> str:
        if text.startswith("Problem") and "Name" in text:
            return "1. a chemist\n2. a poet"
        if "How sure" in text:
            return f"I doubt it. Score: {next(scores)}"
        seen.append(text)
        return f"attempt {next(attempts)}"

    verdict, _, asked = run(Xolver(num_rounds=3), says)
    assert (verdict.text, verdict.confidence) == ("attempt b", 0.7)
    assert len(asked) == Xolver(num_rounds=3).most_calls(1) == 13
    assert seen[0].startswith("You are a chemist.")
    assert seen[1].startswith("You are a poet.")
    # In the last round the two best of all so far, the best first, beside the last attempt of one's own.
    assert "[1]\nattempt b\n\n[2]\nattempt a" in seen[4]
    assert "Your last attempt:\nattempt c" in seen[4]


def test_a_sure_judge_ends_the_rounds() -> None:
    _, _, asked = run(Xolver(num_rounds=9), lambda text, ask: "Score: 10" if "How sure" in text else "x")
    assert len(asked) == 1 + 2 + 2


def test_like_problems_that_were_studied_are_shown() -> None:
    method = Xolver(num_examples=1)
    method.study([("area of a circle", "pi r r"), ("2 + 3?", "Answer: 5")])
    _, texts, _ = run(method, lambda text, ask: "x")
    assert "2 + 3?\nAnswer: 5" in texts[1]
    assert "circle" not in texts[1]


@pytest.mark.parametrize(
    ("said", "score"), [("**Score:** 7", 0.7), ("Score: `8`/10", 0.8), ("Score = 4.5", 0.45)]
)
def test_a_score_is_read_however_it_is_set(said: str, score: float) -> None:
    verdict, *_ = run(Xolver(), lambda text, ask: said if "How sure" in text else "x")
    assert verdict.confidence == score
