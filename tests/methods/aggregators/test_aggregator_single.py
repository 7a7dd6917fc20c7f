"""What the aggregator single promises beyond its kind's contract."""

from __future__ import annotations

from scripted_models import FAILED, run

from mixtura.methods.aggregators.single import Single


def test_the_next_model_is_asked_only_where_one_fails() -> None:
    verdict, _, asked = run(Single(), lambda text, ask: FAILED if ask.model == "a" else "4", "a", "b", "c")
    assert (verdict.text, [ask.model for ask in asked]) == ("4", ["a", "b"])
