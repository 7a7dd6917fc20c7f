"""What the decoder greedy promises beyond its kind's contract."""

from __future__ import annotations

from mixtura.authoring.contracts._decoded import model, tokenizer
from mixtura.running.decoders.entry import decode


def test_takes_the_likeliest_token_whatever_temperature_is_asked_for() -> None:
    texts = {
        decode(model(), tokenizer(), "abc", "greedy", temperature=t, max_new_tokens=6).text
        for t in (0.0, 2.0)
    }
    assert len(texts) == 1
