"""What the aggregator vote promises beyond its kind's contract."""

from __future__ import annotations

from scripted_models import FAILED, run

from mixtura.methods.aggregators.vote import Vote


def test_a_tie_goes_to_the_first_asked() -> None:
    says = {"a": "one", "b": "two", "c": "two", "d": "one"}
    assert run(Vote(), lambda text, ask: says[ask.model], "a", "b", "c", "d")[0].text == "one"
    assert run(Vote(), lambda text, ask: says[ask.model], "b", "a", "c", "d")[0].text == "two"


def test_those_that_fail_have_no_vote() -> None:
    says = {"a": FAILED, "b": "x", "c": "y", "d": "y"}
    verdict, *_ = run(Vote(), lambda text, ask: says[ask.model], "a", "b", "c", "d")
    assert verdict.text == "y"
    assert verdict.confidence is not None
    assert abs(verdict.confidence - 2 / 3) < 1e-12
