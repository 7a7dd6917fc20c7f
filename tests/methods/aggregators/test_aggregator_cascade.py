"""What the aggregator cascade promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

from scripted_models import FAILED, models, run

from mixtura.methods.aggregators import rehearse
from mixtura.methods.aggregators.cascade import Cascade
from mixtura.types.models import Prompt


def test_it_stops_at_the_first_model_that_agrees_with_itself() -> None:
    unsure = {"a": "{}", "b": "same"}
    verdict, _, asked = run(Cascade(), lambda text, ask: unsure[ask.model].format(ask.sample), "a", "b", "c")
    assert (verdict.text, [ask.model for ask in asked]) == ("same", ["a"] * 3 + ["b"] * 3)


def test_less_agreement_is_enough_where_that_is_asked() -> None:
    says = ["x", "y", "x"]
    verdict, _, asked = run(Cascade(agreement=0.6), lambda text, ask: says[ask.sample], "a", "b")
    assert (verdict.text, len(asked)) == ("x", 3)
    assert len(run(Cascade(), lambda text, ask: says[ask.sample], "a", "b")[2]) == 4


def test_where_the_dearest_fails_the_best_so_far_is_the_answer() -> None:
    verdict, *_ = run(Cascade(), lambda text, ask: FAILED if ask.model == "b" else f"{ask.sample}", "a", "b")
    assert verdict.text == "0"
    assert verdict.confidence == 1 / 3


def test_models_without_a_price_come_last() -> None:
    cards = (replace(models("free")[0], output_price=None), *models("priced"))
    _, asked = rehearse(Cascade().plan(Prompt(id="0", text="?"), cards), lambda ask: f"{ask.sample}")
    assert [ask.model for ask in asked] == ["priced"] * 3 + ["free"]


def test_samples_that_failed_are_no_agreement() -> None:
    verdict, _, asked = run(
        Cascade(), lambda text, ask: "sure" if ask.model == "b" or ask.sample == 0 else FAILED, "a", "b"
    )
    assert [ask.model for ask in asked] == ["a"] * 3 + ["b"]
    assert verdict.text == "sure"
