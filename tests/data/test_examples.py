"""Records as examples: which tokens are learned, of conversations, questions and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data import specimen
from mixtura.data.examples import Example, read_examples
from mixtura.data.records import TextError

TOKENIZER = load_tokenizer(specimen.path())
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Drops what an assistant thought once something follows.
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TURNS = [
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": "<think>easy</think>four"},
    {"role": "user", "content": "and two?"},
    {"role": "assistant", "content": "six"},
]


def tokenizer_with(template: str | None) -> Any:
    """The specimen's tokenizer with another chat template."""
    made = load_tokenizer(specimen.path())
    made.chat_template = template
    return made


def examples(tmp_path: Path, record: Any, tokenizer: Any = TOKENIZER, **more: Any) -> tuple[Example, ...]:
    """The examples of a file of one record."""
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(record) + "\n")
    return read_examples(file, tokenizer, **more)


def learned(example: Example, tokenizer: Any = TOKENIZER) -> str:
    """The text that is learned of an example."""
    return str(tokenizer.decode(example.ids[example.learned]))


def test_of_a_conversation_every_answer_is_learned_with_what_ends_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CHATML)
    (made,) = examples(tmp_path, {"messages": TURNS}, tokenizer)
    assert tokenizer.decode(made.ids[:-1]) == (
        "<|user|>two and two?<|end|>\n<|assistant|><think>easy</think>four<|end|>\n"
        "<|user|>and two?<|end|>\n<|assistant|>six<|end|>\n"
    )
    assert learned(made, tokenizer) == "<think>easy</think>four<|end|>\nsix<|end|>\n" + tokenizer.eos_token
    (whole,) = examples(tmp_path, {"messages": TURNS}, tokenizer, answers_only=False)
    assert whole.learned.all()


def test_turns_that_a_template_words_anew_are_not_learned_but_the_last(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(FORGETFUL)
    (made,) = examples(tmp_path, {"messages": TURNS}, tokenizer)
    # The token that holds the answer's first letters holds the space before it, too.
    assert learned(made, tokenizer) == " six" + tokenizer.eos_token


def test_of_a_question_the_answer_is_learned_and_an_end(tmp_path: Path) -> None:
    (made,) = examples(tmp_path, {"prompt": "Question: two and two?\n", "completion": "Answer: 4"})
    assert learned(made) == "Answer: 4" + TOKENIZER.eos_token
    assert TOKENIZER.decode(made.ids[~made.learned]) == TOKENIZER.bos_token + "Question: two and two?\n"


def test_all_of_plain_text_is_learned_and_its_end(tmp_path: Path) -> None:
    (made,) = examples(tmp_path, {"text": "a few words"})
    assert made.learned.all()
    assert TOKENIZER.decode(made.ids) == TOKENIZER.bos_token + "a few words" + TOKENIZER.eos_token


def test_an_end_that_is_there_is_not_doubled(tmp_path: Path) -> None:
    (made,) = examples(tmp_path, {"text": "a few words" + TOKENIZER.eos_token})
    assert (made.ids == TOKENIZER.eos_token_id).sum() == 2  # The specimen begins texts with it, too.


@pytest.mark.parametrize(
    ("record", "template", "says"),
    [
        ({"messages": TURNS}, None, "need a model with a chat template"),
        ({"messages": TURNS[:1]}, CHATML, "has no answers to learn from"),
        ({"prompt": "a question\n", "completion": ""}, CHATML, "has no answers to learn from"),
        ({"massages": TURNS}, CHATML, "has 'massages'; give"),
        ({"messages": "hello"}, CHATML, "must be a list of objects"),
        ({"messages": TURNS}, "{{ raise_exception('no') }}", "does not take the messages"),
        ({"messages": TURNS}, "{{ messages | length }}", "cannot be told apart"),
        (["a", "list"], CHATML, "is not a JSON object"),
        ("a string", CHATML, "is not a JSON object"),
    ],
)
def test_what_cannot_be_learned_from_is_said(tmp_path: Path, record: Any, template: Any, says: str) -> None:
    tokenizer = tokenizer_with(template)
    if record == {"prompt": "a question\n", "completion": ""}:
        tokenizer.eos_token = None
    with pytest.raises(TextError, match=says):
        examples(tmp_path, record, tokenizer)
