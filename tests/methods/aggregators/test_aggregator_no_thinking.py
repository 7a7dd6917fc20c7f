"""What the aggregator no_thinking promises beyond its kind's contract."""

from __future__ import annotations

import pytest
from scripted_models import run

from mixtura.errors import SettingError
from mixtura.methods import create
from mixtura.methods.aggregators.no_thinking import NoThinking
from mixtura.types.asking import Reply


def test_the_surest_answer_is_chosen_where_all_say_how_sure_they_are() -> None:
    sure = [Reply(text="right", logprob=-0.1), Reply(text="x", logprob=-2.0), Reply(text="x", logprob=-1.0)]
    method = NoThinking(num_samples=3, choice="confidence")
    assert run(method, lambda text, ask: sure[ask.sample])[0].text == "right"
    # One that does not say makes it a vote.
    sure[1] = Reply(text="x")
    assert run(method, lambda text, ask: sure[ask.sample])[0].text == "x"


def test_thoughts_of_other_models() -> None:
    _, _, asked = run(NoThinking(thoughts=["<none>", ""]), lambda text, ask: "x")
    assert {ask.prefill for ask in asked} == {"<none>\n"}
    with pytest.raises(SettingError, match="choice of NoThinking must be"):
        create("aggregators", "no_thinking", choice="luck")
