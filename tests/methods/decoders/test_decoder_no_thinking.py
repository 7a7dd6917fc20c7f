"""What the decoder no_thinking promises beyond its kind's contract."""

from __future__ import annotations

from deciding import several

from mixtura.authoring.contracts._decoded import model, tokenizer
from mixtura.methods.decoders.no_thinking import NoThinking
from mixtura.running.decoders.entry import decode


def test_the_answer_begins_with_the_block_and_ends_with_the_final_words() -> None:
    made = decode(
        model(), tokenizer(), "abc", "no_thinking", n=1, thought="xyz", final="FINAL", final_tokens=2,
        max_new_tokens=12
    )  # fmt: skip
    letters = [tokenizer().decode([token]) for token in made.token_ids]
    assert letters[:3] == list("xyz")
    if len(letters) == 12:
        assert letters[5:10] == list("FINAL")


def test_surer_answers_weigh_more() -> None:
    candidates = several(["a:1", "b:2", "c:2", "d:1"])
    for one, certain in zip(candidates, (9.0, 1.0, 2.0, 3.0), strict=True):
        one.certainties = [certain]
    # Ranks 1, 4, 3, 2: the first answer has votes 4 + 3, the second 1 + 2.
    assert NoThinking().select(candidates) == 0
    # With all votes alike the first of equals wins, in whatever order branches are.
    assert NoThinking(power=0.0).select(candidates) == 0
    assert NoThinking().select(candidates[::-1]) == 0


def test_a_verifier_decides() -> None:
    candidates = several(["a:1", "b:2"])
    for one, verdict in zip(candidates, (0.1, 0.7), strict=True):
        one.verdicts = [verdict]
    assert NoThinking().select(candidates) == 1


def test_a_final_answer_is_begun_at_its_beginning_however_few_tokens_there_are() -> None:
    made = decode(
        model(), tokenizer(), "abc", "no_thinking", n=1, thought="xyz", final="FINAL", final_tokens=20,
        max_new_tokens=9,
    )  # fmt: skip
    letters = [tokenizer().decode([token]) for token in made.token_ids]
    assert letters[:8] == list("xyzFINAL")
