"""What the decoder rewiring promises beyond its kind's contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mixtura.authoring.contracts._decoded import model, tokenizer
from mixtura.methods.decoders import Branch, Candidate, Probe, Prompt
from mixtura.methods.decoders.rewiring import Rewiring, surest
from mixtura.running.decoders.bundle import Cost
from mixtura.running.decoders.entry import decode, prepared
from mixtura.running.decoders.probing import ModelProbe
from mixtura.types.steering import Steering


def loss(probe: Probe, text: list[int], vectors: dict[int, torch.Tensor]) -> float:
    steering = {index: Steering(logits=vector) for index, vector in vectors.items()}
    logits = probe.run(text, steering=steering).logits
    return float(F.cross_entropy(logits[:-1], torch.tensor(text[1:])))


def test_the_loss_of_the_text_falls_and_only_vectors_are_learnt() -> None:
    made, text = Rewiring(steps=5, rate=0.5), tokenizer().encode("abcabcabc", add_special_tokens=False)
    inside: Any = model()
    with prepared(inside, [made]) as (runner,):
        probe = ModelProbe(inside, runner.facts, runner.steerer, Cost())
        start = {layer.index: torch.zeros(8) for layer in runner.facts.layers}
        learnt = made._learnt(probe, text, start)
        assert loss(probe, text, learnt) < loss(probe, text, start)
        assert all(bool(vector.any()) for vector in learnt.values())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in inside.parameters())


def test_layers_are_ranked_by_the_log_probability_of_chosen_experts() -> None:
    rows = {0: torch.tensor([[0.5, 0.3]]), 2: torch.tensor([[0.9, 0.01]]), 5: torch.tensor([[0.6, 0.3]])}
    assert surest(rows, 0.34) == (5,)
    assert surest(rows, 0.67) == (0, 5)
    assert surest(rows, 0.0) == (5,)


@pytest.mark.parametrize(("interval", "times"), [(4, 3), (100, 1)])
def test_vectors_are_learnt_again_at_every_interval(
    monkeypatch: pytest.MonkeyPatch, interval: int, times: int
) -> None:
    made, texts = Rewiring(steps=1, interval=interval), []
    own = Rewiring._learnt

    def counted(self: Rewiring, probe: Probe, text: Any, start: Any) -> Any:
        texts.append(len(text))
        return own(self, probe, text, start)

    monkeypatch.setattr(Rewiring, "_learnt", counted)
    new = decode(model(), tokenizer(), "abcde", made, max_new_tokens=9).token_ids
    if len(new) == 9:
        assert texts == [5, 9, 13][:times]


def test_a_prompt_of_one_token_has_nothing_to_learn_from() -> None:
    assert decode(model(), tokenizer(), "a", "rewiring", max_new_tokens=3).token_ids
    assert Rewiring(steps=0).revise(Candidate(prompt=_prompt(), branch=Branch())) is None


def _prompt() -> Prompt:
    from mixtura.authoring.contracts.decoders import sample_prompt

    return sample_prompt()
