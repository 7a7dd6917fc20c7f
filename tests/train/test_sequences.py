"""Sequences made of examples: packing, order, cutting, batches of mixed lengths."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from mixtura.data.examples import Example
from mixtura.errors import UserError
from mixtura.train.sequences import IGNORED, Collator, ExampleSequences


def example(start: int, length: int, asked: int = 1) -> Example:
    """Tokens that count up, of which all after the first ``asked`` are learned."""
    return Example(np.arange(start, start + length), np.arange(length) >= asked)


EXAMPLES = [example(100 * (n + 1), length) for n, length in enumerate([5, 9, 3, 7, 4, 6, 8, 2])]


def documents(item: dict[str, torch.Tensor]) -> list[list[int]]:
    """The documents of an item, told apart by positions."""
    starts = [*(item["position_ids"] == 0).nonzero().squeeze(-1).tolist(), len(item["input_ids"])]
    return [item["input_ids"][a:b].tolist() for a, b in pairwise(starts)]


def test_an_epoch_has_every_document_once_in_few_sequences() -> None:
    made = ExampleSequences(EXAMPLES, 16, num_sequences=100)
    items = [made[number] for number in range(made.per_epoch)]
    seen = sorted(doc for item in items for doc in documents(item))
    assert seen == sorted(one.ids.tolist() for one in EXAMPLES)
    assert all(len(item["input_ids"]) <= 16 for item in items)
    assert len(items) == 3  # 44 tokens in sequences of 16.


def test_what_a_number_holds_does_not_depend_on_what_was_read_before() -> None:
    one, other = (ExampleSequences(EXAMPLES, 16, num_sequences=50, seed=3) for _ in range(2))
    backwards = {number: other[number] for number in reversed(range(50))}
    for number in range(50):
        assert all(torch.equal(value, backwards[number][name]) for name, value in one[number].items())
    first, second = [documents(one[n]) for n in range(3)], [documents(one[n]) for n in range(3, 6)]
    assert first != second


def test_questions_and_first_tokens_are_not_learned() -> None:
    made = ExampleSequences([example(10, 6, asked=3), example(50, 4, asked=0)], 16)
    (item,) = [made[n] for n in range(len(made))]
    assert item["labels"].tolist() == [IGNORED] * 3 + [13, 14, 15] + [IGNORED, 51, 52, 53]


def test_long_text_makes_several_sequences_and_a_long_question_is_cut() -> None:
    text, question = example(0, 20, asked=0), example(100, 20, asked=4)
    made = ExampleSequences([text, question], 8, packed=False)
    assert [one.example.ids[0] for one in made.pieces] == [0, 8, 16, 100]
    assert made.num_cut == 4
    with pytest.raises(UserError, match="cut before its answer at 4 tokens"):
        ExampleSequences([question], 4)


@pytest.mark.parametrize("apart", [True, False])
def test_batches_of_mixed_lengths(apart: bool) -> None:
    made = ExampleSequences(EXAMPLES[:2], 16, packed=False)
    batch = Collator(7, apart=apart)([made[0], made[1]])
    assert batch["input_ids"].shape == (2, 9)
    assert batch["input_ids"][0, 5:].tolist() == [7] * 4
    assert batch["labels"][0, 5:].tolist() == [IGNORED] * 4
    if apart:
        assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
        assert "attention_mask" not in batch
    else:
        assert batch["attention_mask"].sum(1).tolist() == [5, 9]
