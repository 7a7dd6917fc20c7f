"""What the aggregator planner_executor promises beyond its kind's contract."""

from __future__ import annotations

from scripted_models import FAILED, run

from mixtura.methods.aggregators.planner_executor import PlannerExecutor


def test_steps_and_results_are_seen_by_the_planner() -> None:
    def says(text: str, ask: object) -> str:
        if getattr(ask, "model", "") == "hand":
            return "did " + text.rpartition(": ")[2]
        return "Done: both" if "did two" in text else "Step: two" if "did one" in text else "Step 1: one"

    verdict, texts, asked = run(PlannerExecutor(), says, "head", "hand")
    assert verdict.text == "both"
    assert [ask.model for ask in asked] == ["head", "hand"] * 2 + ["head"]
    assert "1. one -> did one\n2. two -> did two" in texts[-1]


def test_the_loop_is_bounded_and_then_not_sure() -> None:
    verdict, _, asked = run(PlannerExecutor(most_steps=2), lambda text, ask: "Step: on", "head", "hand")
    assert (verdict.text, verdict.confidence, len(asked)) == ("Step: on", 0.0, 5)


def test_a_step_that_failed_is_told() -> None:
    _, texts, _ = run(
        PlannerExecutor(most_steps=1), lambda text, ask: FAILED if ask.model == "b" else "Step: x", "a", "b"
    )
    assert "1. x -> (failed)" in texts[-1]
