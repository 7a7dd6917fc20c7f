"""What the aggregator diverse promises beyond its kind's contract."""

from __future__ import annotations

from scripted_models import FAILED, run

from mixtura.methods.aggregators.diverse import Diverse

WAYS = "1. draw it\n- guess\n\n  3) count"


def says(text: str, ask: object) -> str:
    if text.startswith("Name"):
        return WAYS
    return "Answer: 5" if "guess" in text else "Answer: 4"


def test_one_call_names_approaches_and_each_is_followed() -> None:
    verdict, texts, asked = run(Diverse(num_approaches=3), says)
    assert len(asked) == 4
    assert [way in text for way, text in zip(("draw it", "guess", "count"), texts[1:], strict=True)] == [
        True
    ] * 3
    assert verdict.text == "Answer: 4"


def test_within_one_call_all_are_named() -> None:
    _, texts, _ = run(Diverse(num_approaches=3, within_call=True), says)
    assert len(texts) == 2
    assert all(way in texts[1] for way in ("- draw it", "- guess", "- count"))


def test_without_approaches_the_problem_is_asked_as_often() -> None:
    verdict, texts, asked = run(
        Diverse(num_approaches=3), lambda text, ask: FAILED if "Name" in text else "4"
    )
    assert (verdict.text, len(asked)) == ("4", 4)
    assert texts[1:] == ["2 + 2?"] * 3
    assert [(ask.sample, ask.temperature) for ask in asked[1:]] == [(0, 0.7), (1, 0.7), (2, 0.7)]
