"""Weights by what models did on neighbours, worked by a plain loop; the reasoner never sees the question."""

from __future__ import annotations

import random

from scripted_models import FAILED, models, run

from mixtura.methods.aggregators import rehearse
from mixtura.methods.aggregators.neighbour_votes import NeighbourVotes
from mixtura.types.asking import Ask, Reply
from mixtura.types.models import Prompt

KNOWN = [(f"known question {n}", f"so the answer is {n % 3}") for n in range(6)]


def test_votes_weigh_what_models_did_on_neighbours() -> None:
    draw = random.Random(0)
    for _ in range(50):
        said = {
            (m, text): str(draw.randint(0, 2))
            for m in "abc"
            for text in ["new", *(known for known, _ in KNOWN)]
        }
        method = NeighbourVotes(num_neighbours=6)
        method.study(KNOWN)
        plan = method.plan(Prompt(id="0", text="new"), models("a", "b", "c"))
        verdict, asked = rehearse(plan, lambda ask, said=said: said[ask.model, ask.messages[-1].content])
        weight = dict.fromkeys("012", 0.0)
        for m in "abc":
            right = sum(said[m, known] == truth[-1] for known, truth in KNOWN)
            weight[said[m, "new"]] += (1 + right) / 8
        assert weight[verdict.text] == max(weight.values())
        assert verdict.confidence is not None
        assert abs(verdict.confidence - max(weight.values()) / sum(weight.values())) < 1e-12
        assert len(asked) == method.most_calls(3)


def test_the_nearest_are_asked_and_without_examples_it_is_a_plain_vote() -> None:
    method = NeighbourVotes(num_neighbours=1)
    method.study([("red apples", "1"), ("blue whales", "2")])
    _, texts, _ = run(method, lambda text, ask: "1", text="how many blue whales")
    assert texts == ["how many blue whales", "blue whales"]
    said = {"a": "x", "b": "y", "c": "y"}
    verdict, texts, _ = run(NeighbourVotes(), lambda text, ask: said[ask.model], "a", "b", "c")
    assert (verdict.text, len(texts)) == ("y", 3)


def test_the_reasoner_sees_predictions_and_no_question() -> None:
    method = NeighbourVotes(num_neighbours=1, reasons=True)
    method.study([("known", "7")])

    def script(text: str, ask: Ask) -> str | Reply:
        return "Answer: 9" if "predictor" in text else ("7" if ask.model == "a" else FAILED)

    verdict, texts, _ = run(method, script, "a", "b", text="the secret question")
    assert verdict.text == "Answer: 9"
    assert "secret" not in texts[-1]
    assert "predictor 1: 7\npredictor 2: nothing\ntrue answer: 7" in texts[-1]
    failing, _, _ = run(method, lambda text, ask: FAILED if "predictor" in text else "7", "a", "b")
    assert failing.text == "7"
    nothing, texts, _ = run(method, lambda text, ask: FAILED, "a", "b")
    assert nothing.abstained
    assert len(texts) == 4
