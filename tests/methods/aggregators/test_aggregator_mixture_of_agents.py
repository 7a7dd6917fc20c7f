"""What the aggregator mixture_of_agents promises beyond its kind's contract."""

from __future__ import annotations

from scripted_models import run

from mixtura.methods.aggregators.mixture_of_agents import MixtureOfAgents


def test_each_layer_sees_all_answers_of_the_one_before() -> None:
    def says(text: str, ask: object) -> str:
        level = 0 if "Answers:" not in text else 1 + text.count("level 1") // 2
        return f"level {level} of {getattr(ask, 'model', '')}"

    verdict, texts, asked = run(MixtureOfAgents(num_layers=2), says, "a", "b")
    assert [ask.model for ask in asked] == ["a", "b", "a", "b", "a"]
    assert "level 0 of a" in texts[2]
    assert "level 0 of b" in texts[2]
    assert "level 1 of a" in texts[4]
    assert "level 0" not in texts[4]
    assert verdict.text == "level 2 of a"
