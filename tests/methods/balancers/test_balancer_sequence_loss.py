"""What the balancer sequence_loss promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixtura.authoring.contracts import sample_routing
from mixtura.errors import UserError
from mixtura.methods.balancers.sequence_loss import SequenceLoss
from mixtura.types import BalancerInput, Routing


def _routing(experts: list[int], num_experts: int = 2) -> Routing:
    chosen = torch.tensor(experts)[:, None]
    scores = 0.2 + 0.6 * torch.nn.functional.one_hot(chosen[:, 0], num_experts)
    valid = torch.ones(len(experts), dtype=torch.bool)
    return Routing.from_choices(chosen, scores.gather(1, chosen), scores=scores, logits=scores, valid=valid)


def test_equals_the_formula_in_a_plain_loop() -> None:
    routing = sample_routing(seed=1, hot=1.0)
    ids = torch.arange(64) % 5
    total = 0.0
    for sequence in range(5):
        members = [t for t in range(64) if ids[t] == sequence and routing.valid[t]]
        counts, scores = [0] * 8, [0.0] * 8
        for token, expert in zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True):
            counts[expert] += token in members
        for token in members:
            row = routing.scores[token]
            for expert in range(8):
                scores[expert] += (row[expert] / row.sum()).item() / len(members)
        # f_e = E / (K * T) * count, here with K = 2.
        frequency = [8 / (2 * len(members)) * count for count in counts]
        value = sum(f * p for f, p in zip(frequency, scores, strict=True))
        total += value * len(members) / int(routing.valid.sum())
    made = SequenceLoss(coefficient=0.5).loss(BalancerInput(routing=routing, sequence_ids=ids)).item()
    assert made == pytest.approx(0.5 * total, rel=1e-5)


def test_sequences_that_are_uneven_in_opposite_ways_are_both_penalised() -> None:
    routing = _routing([0, 0, 1, 1])
    apart = BalancerInput(routing=routing, sequence_ids=torch.tensor([0, 0, 1, 1]))
    mixed = BalancerInput(routing=routing, sequence_ids=torch.tensor([0, 1, 0, 1]))
    losses = [SequenceLoss(coefficient=1.0).loss(inputs).item() for inputs in (apart, mixed)]
    assert losses == pytest.approx([1.6, 1.0])


def test_scale_of_scores_does_not_matter() -> None:
    routing = sample_routing(seed=2)
    ids = torch.arange(64) // 16
    larger = replace(routing, scores=3 * routing.scores)
    values = [SequenceLoss().loss(BalancerInput(routing=r, sequence_ids=ids)) for r in (routing, larger)]
    torch.testing.assert_close(values[0], values[1])


def test_micro_batches_of_whole_sequences_average_to_the_batch() -> None:
    routing = _routing([0, 0, 1, 0, 1, 1, 0, 0])
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    parts = [
        Routing.from_assignments(
            routing.token_ids,
            routing.expert_ids,
            routing.weights,
            scores=routing.scores,
            logits=routing.logits,
            valid=ids == sequence,
        )
        for sequence in (0, 1)
    ]
    whole, first, second = (
        SequenceLoss(coefficient=1.0).loss(BalancerInput(routing=r, sequence_ids=ids))
        for r in (routing, *parts)
    )
    torch.testing.assert_close(whole, first * 3 / 8 + second * 5 / 8)


def test_says_that_it_needs_sequence_ids() -> None:
    with pytest.raises(UserError, match="sequence_ids"):
        SequenceLoss().loss(BalancerInput(routing=sample_routing()))
