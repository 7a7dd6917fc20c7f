"""What the aggregator self_moa promises beyond its kind's contract."""

from __future__ import annotations

import pytest
from scripted_models import FAILED, run

from mixtura.methods.aggregators.self_moa import SelfMoa


def drafts(text: str) -> int:
    return text.count("\n[") if "Answers:" in text else 0


def says(text: str, ask: object) -> str:
    return "joined" if drafts(text) else f"draft {getattr(ask, 'sample', 0)}"


def test_as_many_as_the_window_are_joined_at_once() -> None:
    _, texts, _ = run(SelfMoa(num_samples=6, window=6), says)
    assert [drafts(text) for text in texts[6:]] == [6]


@pytest.mark.parametrize(("number", "window"), [(6, 3), (7, 3), (2, 2), (5, 2), (12, 6)])
def test_no_window_is_passed_and_each_begins_with_the_best_so_far(number: int, window: int) -> None:
    verdict, texts, asked = run(SelfMoa(num_samples=number, window=window), says)
    joined = texts[number:]
    assert max(drafts(text) for text in joined) <= window
    assert all("[1]\njoined" in text for text in joined[1:])
    # Every draft is shown once.
    shown = "\n".join(joined)
    assert all(shown.count(f"\ndraft {n}\n") == 1 for n in range(number))
    assert verdict.text == "joined"
    assert len(asked) == SelfMoa(num_samples=number, window=window).most_calls(3)


def test_one_sample_needs_no_joining_and_a_failed_joining_keeps_the_first() -> None:
    assert len(run(SelfMoa(num_samples=1), says)[2]) == 1
    verdict, *_ = run(SelfMoa(), lambda text, ask: FAILED if drafts(text) else f"draft {ask.sample}")
    assert verdict.text == "draft 0"
