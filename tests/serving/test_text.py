"""Text while its tokens come."""

from __future__ import annotations

import random

import pytest
from serving_helpers import SPECIMEN

from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.serving.engine.text import TextReader

TEXTS = (
    "plain words, and 17 + 28 = 45\n",
    "Grüße, 日本語 und 🙂🙃 am Ende",
    "  two  spaces\tand\n\nlines",
    "¿Qué?",
)


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return load_tokenizer(SPECIMEN)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_whole(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    reader = TextReader(tokenizer)
    pieces = [reader.add(token) for token in ids] + [reader.end()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    assert sum(map(bool, pieces)) > 1


def test_any_bytes_come_out_in_the_end(tokenizer) -> None:  # type: ignore[no-untyped-def]
    draw = random.Random(0)
    for _ in range(20):
        ids = [draw.randrange(4, 300) for _ in range(30)]
        reader = TextReader(tokenizer)
        text = "".join([reader.add(token) for token in ids]) + reader.end()
        assert len(text) > 5


@pytest.mark.parametrize("stop", ["28 =", "=", "45\n", "7 + 2"])
def test_what_may_begin_a_stop_string_waits(tokenizer, stop: str) -> None:  # type: ignore[no-untyped-def]
    text = TEXTS[0]
    reader = TextReader(tokenizer, ["never", stop])
    said = ""
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        said += reader.add(token)
        assert stop[0] not in said[text.index(stop) :]
        if reader.is_stopped:
            break
    assert reader.is_stopped
    assert said == text[: text.index(stop)]


def test_what_was_held_for_a_stop_string_that_did_not_come_is_told(tokenizer) -> None:  # type: ignore[no-untyped-def]
    reader = TextReader(tokenizer, ["45\nand more"])
    said = "".join(reader.add(t) for t in tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"])
    assert not said.endswith("45\n")
    assert said + reader.end() == TEXTS[0]
