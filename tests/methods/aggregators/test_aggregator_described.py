"""What the aggregator described promises beyond its kind's contract."""

from __future__ import annotations

from scripted_models import run

from mixtura.methods.aggregators.described import Described


def route(said: str):  # type: ignore[no-untyped-def]
    def says(text: str, ask: object) -> str:
        if text.startswith("Choose"):
            return said
        return "joined" if "Answers:" in text else f"by {getattr(ask, 'model', '')}"

    return says


def asked_of(said: str, *names: str, **given: int) -> tuple[str, list[str]]:
    verdict, _, asked = run(Described(**given), route(said), *names)
    return verdict.text, [ask.model for ask in asked]


def test_an_id_that_is_not_there_is_never_asked() -> None:
    assert asked_of("Agents: A7, A2", "r", "law", "tax") == ("by tax", ["r", "tax"])
    assert asked_of("Agents: A12", "r", "law", "tax") == ("by law", ["r", "law"])


def test_several_answers_are_joined_and_too_many_are_cut() -> None:
    assert asked_of("Agents: A1, A2", "r", "law", "tax") == ("joined", ["r", "law", "tax", "r"])
    assert asked_of("Agents: A3, A2, A1", "r", "x", "y", "z", most_agents=1) == ("by z", ["r", "z"])


def test_out_of_scope_is_no_answer_and_gibberish_is_the_first() -> None:
    verdict, _, asked = run(Described(), route("Not ours.\nAgents: none"), "r", "law")
    assert (verdict.abstained, len(asked)) == (True, 1)
    assert asked_of("hmm", "r", "law", "tax") == ("by law", ["r", "law"])
    assert asked_of("Agents: A1", "only") == ("by only", ["only", "only"])
