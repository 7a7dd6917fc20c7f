"""What the decoder self_consistency promises beyond its kind's contract."""

from __future__ import annotations

import pytest
from deciding import several

from mixtura.methods.decoders._shared import answer_of
from mixtura.methods.decoders.self_consistency import SelfConsistency


def test_a_solution_of_the_commonest_answer_is_given() -> None:
    texts = ["a\nA:7", "b\nA:9", "c\nA:9", "d\nA:7", "e\nA:9"]
    assert SelfConsistency().select(several(texts)) == 1


def test_what_the_branches_order_is_does_not_matter_to_the_answer() -> None:
    texts = ["x:1", "y:2", "z:2"]
    chosen = {answer_of(order[SelfConsistency().select(several(order))]) for order in (texts, texts[::-1])}
    assert chosen == {"2"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", ""),
        ("42", "42"),
        ("Answer: B.", "b"),
        ("so\n\n**12**\n", "12"),
        ("time: 10:30", "30"),
        ("why:", "why"),
    ],
)
def test_answers_in_texts(text: str, answer: str) -> None:
    assert answer_of(text) == answer
