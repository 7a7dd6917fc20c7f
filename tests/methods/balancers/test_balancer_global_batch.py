"""What the balancer global_batch promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.balancers.global_batch import GlobalBatch
from mixtura.methods.balancers.switch_loss import SwitchLoss
from mixtura.types import BalancerInput, Routing


def _domain(experts: tuple[int, int], num_tokens: int = 8) -> Routing:
    """A micro-batch of one domain, whose tokens use only these two of four experts."""
    logits = torch.zeros(num_tokens, 4).index_fill(1, torch.tensor(experts), 2.0).requires_grad_()
    scores = logits.softmax(-1)
    chosen = torch.tensor(experts).expand(num_tokens, 2)
    valid = torch.ones(num_tokens, dtype=torch.bool)
    return Routing.from_choices(chosen, scores.gather(1, chosen), scores=scores, logits=logits, valid=valid)


def test_micro_batches_of_one_domain_each_cost_nothing_extra_if_the_batch_is_even() -> None:
    parts = [_domain((0, 1)), _domain((2, 3))]
    load = torch.stack([part.load for part in parts]).sum(0)
    for part in parts:
        whole = GlobalBatch(coefficient=1.0).loss(BalancerInput(routing=part, load=load))
        torch.testing.assert_close(whole, torch.tensor(1.0))
        (slope,) = torch.autograd.grad(whole, part.logits)
        torch.testing.assert_close(slope, torch.zeros_like(slope))
        alone = GlobalBatch(coefficient=1.0).loss(BalancerInput(routing=part))
        assert alone > 1.7


def test_equals_a_plain_loop_over_micro_batches() -> None:
    parts = [_domain((0, 1), 8), _domain((1, 2), 4)]
    counts = [8, 12, 4, 0]
    expected = 0.0
    for part in parts:
        for row in part.scores.tolist():
            expected += sum(4 * counts[e] / 24 * row[e] for e in range(4)) / 12
    load = torch.tensor(counts)
    made = [
        GlobalBatch(coefficient=1.0).loss(BalancerInput(routing=part, load=load)) * len(part.valid) / 12
        for part in parts
    ]
    torch.testing.assert_close(sum(made), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_a_little_of_the_micro_batch_loss_is_added_on_top() -> None:
    part, load = _domain((0, 1)), torch.tensor([5, 5, 5, 5])
    both = GlobalBatch(coefficient=0.5, micro_batch_coefficient=0.1)
    local = SwitchLoss(coefficient=0.1).loss(BalancerInput(routing=part))
    torch.testing.assert_close(both.loss(BalancerInput(routing=part, load=load)), 0.5 + local)
