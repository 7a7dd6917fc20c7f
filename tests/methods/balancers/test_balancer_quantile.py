"""What the balancer quantile promises beyond its kind's contract."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.authoring.contracts import sample_routing
from mixtura.methods._scores import violation
from mixtura.methods.balancers.loss_free import LossFree
from mixtura.methods.balancers.quantile import Quantile
from mixtura.types import BalancerInput, LayerShape, Routing

SHAPE = LayerShape(d_model=4, d_expert=4, num_experts=8)


def _routed(plain: Routing, bias: Tensor) -> Routing:
    chosen = (plain.scores.detach() + bias).topk(2).indices
    return Routing.from_choices(
        chosen, plain.scores.gather(1, chosen), scores=plain.scores, logits=plain.logits, valid=plain.valid
    )


def test_its_share_of_tokens_is_above_each_experts_bar() -> None:
    plain = sample_routing(seed=3, num_tokens=256, hot=1.5)
    state = Quantile().start(SHAPE)
    bias = Quantile().update(BalancerInput(routing=plain, state=state))["bias"]
    scores = plain.scores[plain.valid].detach()
    # Up to the shift to a mean of 0, which is the same for all experts and is taken out first.
    bars = scores.sort(-1, descending=True).values[:, 2]
    share = len(scores) * 2 // 8
    shift = torch.stack([(scores[:, e] - bars).sort(descending=True).values[share] for e in range(8)])
    torch.testing.assert_close(bias, shift.mean() - shift)
    # Tokens whose bar is the expert's own score lie on it together; without them the share is exact.
    margins = scores - bars[:, None]
    above, at_least = (margins > shift).sum(0), (margins >= shift).sum(0)
    assert (above <= share).all()
    assert (at_least > share).all()
    assert (above == share).any()


def test_one_step_evens_out_more_than_a_hundred_of_the_sign_rule() -> None:
    plain = sample_routing(seed=4, num_tokens=512, hot=2.0)
    quantile = Quantile(num_rounds=3)
    bias = quantile.update(BalancerInput(routing=plain, state=quantile.start(SHAPE)))["bias"]
    slow = LossFree(rate=0.001)
    state = slow.start(SHAPE)
    for _ in range(100):
        state = slow.update(BalancerInput(routing=_routed(plain, state["bias"]), state=state))
    worst = [violation(_routed(plain, b).load) for b in (bias, state["bias"], torch.zeros(8))]
    assert worst[0] < 0.15 < worst[1] < worst[2]


def test_more_rounds_come_nearer_to_balance() -> None:
    plain = sample_routing(seed=5, num_tokens=512, hot=3.0)
    worst = []
    for num_rounds in (1, 3, 20):
        balancer = Quantile(num_rounds=num_rounds)
        bias = balancer.update(BalancerInput(routing=plain, state=balancer.start(SHAPE)))["bias"]
        worst.append(violation(_routed(plain, bias).load).item())
    assert worst[0] > worst[1] > worst[2]
    assert worst[2] < 0.05


def test_memory_keeps_part_of_the_old_bias() -> None:
    plain = sample_routing(seed=6, hot=1.0)
    old = torch.arange(8.0) / 100
    made = [
        Quantile(memory=memory).update(BalancerInput(routing=plain, state={"bias": old}))["bias"]
        for memory in (0.0, 0.75, 1.0)
    ]
    torch.testing.assert_close(made[1], 0.75 * old + 0.25 * made[0])
    torch.testing.assert_close(made[2], old)


def test_a_layer_that_uses_every_expert_is_left_alone() -> None:
    scores = torch.rand(10, 4, generator=torch.Generator().manual_seed(0))
    chosen = torch.arange(4).expand(10, 4)
    valid = torch.ones(10, dtype=torch.bool)
    routing = Routing.from_choices(chosen, scores, scores=scores, logits=scores, valid=valid)
    state = {"bias": torch.tensor([0.1, 0.0, 0.0, -0.1])}
    torch.testing.assert_close(Quantile().update(BalancerInput(routing=routing, state=state)), state)
