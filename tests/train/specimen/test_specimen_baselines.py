"""The baselines of the card, against counts by hand and the compressor itself."""

from __future__ import annotations

import lzma
import math

import numpy as np
import pytest

from mixtura.train.specimen.baselines import (
    NGram,
    byte_ngram_bits,
    byte_symbols,
    token_ngram_bits,
    xz_alone_bits,
    xz_bytes,
    xz_primed_bits,
)


def plain_witten_bell(training: list[int], context: list[int], symbol: int, size: int) -> float:
    """The probability by direct counting, one context symbol less at a time."""
    chance = 1.0 / size
    for length in range(len(context) + 1):
        tail = context[len(context) - length :]
        places = [i for i in range(len(training) - length) if training[i : i + length] == tail]
        followers = [training[i + length] for i in places]
        if followers:
            kinds = len(set(followers))
            chance = (followers.count(symbol) + kinds * chance) / (len(followers) + kinds)
    return chance


def test_ngram_agrees_with_direct_counting() -> None:
    rng = np.random.default_rng(0)
    training = rng.integers(0, 4, 200)
    test = rng.integers(0, 4, 30)
    model = NGram(training.astype(np.uint64), 3, 2, 4)
    wanted = -sum(
        math.log2(plain_witten_bell(training.tolist(), test[max(0, i - 2) : i].tolist(), int(test[i]), 4))
        for i in range(len(test))
    )
    assert model.bits(test.astype(np.uint64)) == pytest.approx(wanted, rel=1e-9)


def test_ngram_gives_probabilities() -> None:
    model = NGram(byte_symbols("abracadabra" * 5), 3, 8, 256)
    context = byte_symbols("ab")
    total = sum(
        2.0 ** -(model.bits(np.append(context, np.uint64(s))) - model.bits(context)) for s in range(256)
    )
    assert total == pytest.approx(1.0, abs=1e-9)


def test_repetition_is_cheap_and_noise_is_not() -> None:
    assert byte_ngram_bits("hello world " * 50, ["hello world " * 5]) < 60
    assert byte_ngram_bits("hello world " * 50, ["ZQXJ"]) > 4 * 8
    ids = [0, *range(1, 50)] * 20
    assert token_ngram_bits(ids, [ids[:50]], 64) < 100


def test_xz_is_the_compressor_and_priming_helps() -> None:
    text = "some words that come again and again\n" * 3
    assert xz_bytes(text) == len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    assert xz_alone_bits([text, text]) == 16 * xz_bytes(text)
    assert xz_primed_bits(text * 10, [text]) < xz_alone_bits([text])
