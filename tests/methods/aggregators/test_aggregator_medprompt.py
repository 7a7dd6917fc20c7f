"""What the aggregator medprompt promises beyond its kind's contract."""

from __future__ import annotations

import pytest
from scripted_models import run

from mixtura.errors import UserError
from mixtura.methods.aggregators.medprompt import Medprompt

OPTIONS = "Paris\nRome\nOslo"


def knows(text: str, ask: object) -> str:
    return f"Answer: ({text.partition(') Rome')[0][-1]})"


@pytest.mark.parametrize("options", [OPTIONS, "Rome\nOslo\nParis", "Oslo\nParis\nRome\nBern"])
def test_the_order_of_options_changes_nothing_for_who_knows(options: str) -> None:
    assert run(Medprompt(), knows, text="Italy?", options=options)[0].text == "Rome"


def test_always_the_same_letter_is_no_answer() -> None:
    verdict, texts, _ = run(Medprompt(num_orders=6), lambda text, ask: "Answer: A", text="?", options=OPTIONS)
    assert verdict.abstained
    firsts = [text.partition("A) ")[2].partition("\n")[0] for text in texts]
    assert sorted(firsts) == sorted(OPTIONS.split("\n") * 2)


def test_the_most_like_examples_are_shown_the_nearest_last() -> None:
    method = Medprompt(num_orders=1, num_examples=2)
    method.study([("capital of France", "p"), ("size of a cat", "c"), ("the capital of Italy", "r")])
    _, (text,), _ = run(method, knows, text="the capital of Italy?", options=OPTIONS)
    assert "size of a cat" not in text
    assert text.index("capital of France") < text.index("the capital of Italy\n") < text.index("Italy?")


def test_an_answer_that_is_no_option_has_no_vote_and_options_are_needed() -> None:
    verdict, *_ = run(Medprompt(), lambda text, ask: "Answer: Z", text="?", options=OPTIONS)
    assert verdict.abstained
    with pytest.raises(UserError, match="medprompt needs the label 'options'"):
        run(Medprompt(), knows)
