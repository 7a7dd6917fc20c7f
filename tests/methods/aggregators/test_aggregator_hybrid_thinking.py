"""What the aggregator hybrid_thinking promises beyond its kind's contract."""

from __future__ import annotations

from scripted_models import FAILED, run

from mixtura.methods.aggregators.hybrid_thinking import HybridThinking
from mixtura.types.asking import Reply


def test_a_check_that_fails_runs_the_experts_in_turn() -> None:
    def says(text: str, ask: object) -> str:
        if "Check the answer" in text:
            return "YES" if "better" in text else "Hmm. NO"
        if "Divide the problem" in text:
            return "Expert: reads\nExpert 2: counts\nno expert"
        if "You are this expert" in text:
            return "found " + text.rpartition("expert: ")[2]
        return "better" if "What experts found" in text else "first"

    verdict, texts, _ = run(HybridThinking(), says)
    assert (verdict.text, verdict.confidence) == ("better", 1.0)
    assert len(texts) == 2 + 1 + 2 + 2
    assert "found reads" in texts[4]
    assert "found reads" in texts[5]
    assert "found counts" in texts[5]


def test_a_verdict_that_cannot_be_read_is_no() -> None:
    verdict, texts, _ = run(HybridThinking(num_rounds=2), lambda text, ask: "perhaps")
    assert (verdict.text, verdict.confidence) == ("perhaps", 0.0)
    # No expert can be read either: each round is a design, an end and a check.
    assert len(texts) == 2 + 2 * 3


def test_where_there_is_no_answer_a_check_that_says_yes_makes_none() -> None:
    def script(text: str, ask: object) -> str | Reply:
        return "YES" if "Check the answer" in text else FAILED

    verdict, texts, _ = run(HybridThinking(num_rounds=2), script)
    assert verdict.abstained
    assert not any("Check the answer" in text for text in texts)
