"""What the aggregator boost_step promises beyond its kind's contract."""

from __future__ import annotations

from scripted_models import run

from mixtura.methods.aggregators.boost_step import BoostStep


def test_calls_are_steps_and_hits() -> None:
    tries = iter(["move the seven over", "divide by the factor", "Answer: 2"])

    def says(text: str, ask: object) -> str:
        return "divided well" if "in mind" in text else next(tries)

    method = BoostStep()
    method.study([("3x = 6", "divide by the factor"), ("x - 1 = 0", "add one")])
    verdict, texts, _ = run(method, says, text="2x + 7 = 11")
    assert verdict.text == "Answer: 2"
    assert len(texts) == 3 + 1
    assert "from the problem '3x = 6'" in texts[2]
    assert "Steps so far:\nmove the seven over\ndivided well" in texts[3]


def test_a_repeated_step_asks_the_problem_as_it_is() -> None:
    verdict, texts, asked = run(BoostStep(), lambda text, ask: "whole" if ask.plain else "again")
    assert (verdict.text, len(texts)) == ("whole", 3)
    assert asked[-1].plain


def test_under_the_threshold_the_first_try_stays() -> None:
    method = BoostStep()
    method.study([("p", "entirely other words here")])
    _, texts, _ = run(method, lambda text, ask: "Answer: 1")
    assert len(texts) == 1
