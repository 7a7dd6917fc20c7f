"""What the aggregator skills_in_context promises beyond its kind's contract."""

from __future__ import annotations

from scripted_models import run

from mixtura.methods.aggregators.skills_in_context import SkillsInContext


def test_skills_then_compositions_then_the_question_in_one_call() -> None:
    method = SkillsInContext(skills=["add", "carry"], most_examples=1)
    method.study([("1 + 9?", "By <add> and <carry>: 10"), ("never shown", "x")])
    _, (text,), _ = run(method, lambda text, ask: "x", text="7 + 8?")
    parts = ["1. add", "2. carry", "1 + 9?", "By <add> and <carry>: 10", "7 + 8?"]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)
    assert "never shown" not in text


def test_without_skills_and_examples_the_question_alone() -> None:
    _, (text,), _ = run(SkillsInContext(), lambda text, ask: "x", text="7 + 8?")
    assert text.startswith("Question: 7 + 8?")
