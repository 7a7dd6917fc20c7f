"""Texts as vectors: the same everywhere, alike where texts are, and refused where there are none."""

from __future__ import annotations

import numpy as np
import pytest

from mixtura.errors import UserError
from mixtura.running.composing.encoder import HashedTfidf, Remembered, embed
from mixtura.types.models import Prompt


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(id=str(n), text=text) for n, text in enumerate(texts)]


def test_rows_are_one_long_and_like_texts_are_near() -> None:
    encode = HashedTfidf(256)
    texts = ["the prime factors of a number", "the factors of a prime number", "a poem of autumn leaves", ""]
    encode.fit(texts)
    rows = encode(texts)
    assert np.allclose(np.linalg.norm(rows, axis=1), [1, 1, 1, 0])
    assert rows[0] @ rows[1] > 0.5 > rows[0] @ rows[2]


def test_rare_words_weigh_more() -> None:
    encode = HashedTfidf(4096)
    encode.fit(["common rare", "common", "common", "common"])
    row = encode(["common rare"])[0]
    alone = {word: encode([word])[0] for word in ("common", "rare")}
    assert abs(row @ alone["rare"]) > abs(row @ alone["common"]) > 0


def test_a_text_has_the_same_vector_whatever_stands_beside_it() -> None:
    encode = HashedTfidf(64)
    assert np.array_equal(encode(["a b", "c"])[0], encode(["a b"])[0])


def test_it_does_not_depend_on_the_process() -> None:
    # Python's own hash of a word differs from one process to the next.
    assert np.flatnonzero(HashedTfidf(1000)(["mixture"])[0]).tolist() == [788]


def test_an_encoder_of_the_users_own() -> None:
    batch = embed(prompts("aa", "b"), lambda texts: [[len(text), 0.0] for text in texts])
    assert batch.embeddings.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    for wrong in (lambda texts: [[1.0]], lambda texts: [[np.nan]] * len(texts), lambda texts: [1.0, 2.0]):
        with pytest.raises(UserError, match="it must give one vector of finite numbers a text"):
            embed(prompts("a", "b"), wrong)


def test_each_text_is_encoded_once() -> None:
    asked: list[str] = []

    def encode(texts: list[str]) -> list[list[float]]:
        asked.extend(texts)
        return [[float(len(text))] for text in texts]

    remembered = Remembered(encode)
    assert remembered(["a", "bb", "a"]).tolist() == [[1.0], [2.0], [1.0]]
    assert remembered(["bb", "ccc"]).tolist() == [[2.0], [3.0]]
    assert asked == ["a", "bb", "ccc"]
