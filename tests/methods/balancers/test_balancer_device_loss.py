"""What the balancer device_loss promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.authoring.contracts import sample_routing
from mixtura.errors import UserError
from mixtura.methods.balancers.device_loss import DeviceLoss
from mixtura.types import BalancerInput, LayerShape, Routing


def _routing(experts: list[int]) -> Routing:
    chosen = torch.tensor(experts)[:, None]
    scores = torch.nn.functional.one_hot(chosen[:, 0], 4).float()
    valid = torch.ones(len(experts), dtype=torch.bool)
    return Routing.from_choices(chosen, scores.gather(1, chosen), scores=scores, logits=scores, valid=valid)


def test_uneven_experts_on_even_devices_cost_no_more_than_balance() -> None:
    # Experts 0 and 1 are on the first device, 2 and 3 on the second.
    inputs = BalancerInput(routing=_routing([0, 0, 0, 2, 2, 3]))
    assert DeviceLoss(num_devices=2, coefficient=1.0).loss(inputs).item() == pytest.approx(1.0)
    assert DeviceLoss(num_devices=4, coefficient=1.0).loss(inputs).item() > 1.3


def test_one_busy_device_costs_the_number_of_devices() -> None:
    inputs = BalancerInput(routing=_routing([0, 1, 0, 1]))
    assert DeviceLoss(num_devices=2, coefficient=1.0).loss(inputs).item() == pytest.approx(2.0)


def test_equals_the_papers_formula() -> None:
    routing = sample_routing(seed=1, hot=1.0)
    num_valid, top_k = int(routing.valid.sum()), 2
    scores = routing.scores[routing.valid].detach().mean(0)
    total = 0.0
    for device in range(4):
        members = [2 * device, 2 * device + 1]
        frequency = sum(8 / (top_k * num_valid) * int(routing.load[e]) for e in members) / len(members)
        total += frequency * float(scores[members].sum())
    made = DeviceLoss(num_devices=4, coefficient=1.0).loss(BalancerInput(routing=routing)).item()
    assert made == pytest.approx(total, rel=1e-5)


def test_experts_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(UserError, match="8 experts cannot be divided into 3 devices"):
        DeviceLoss(num_devices=3).start(LayerShape(d_model=4, d_expert=4, num_experts=8))
    with pytest.raises(UserError, match="8 experts cannot be divided into 3 devices"):
        DeviceLoss(num_devices=3).loss(BalancerInput(routing=sample_routing()))
