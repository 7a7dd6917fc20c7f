"""What the balancer loss_free promises beyond its kind's contract."""

from __future__ import annotations

import torch

import mixtura
from mixtura.authoring.contracts import sample_routing
from mixtura.methods._scores import violation
from mixtura.methods.balancers.loss_free import LossFree
from mixtura.types import BalancerInput, LayerShape, RouterInput, Routing

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)


def _routing(counts: list[int]) -> Routing:
    """One choice a token, so many of each expert."""
    chosen = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[:, None]
    scores = torch.full((len(chosen), len(counts)), 1 / len(counts))
    valid = torch.ones(len(chosen), dtype=torch.bool)
    return Routing.from_choices(chosen, scores[:, :1], scores=scores, logits=scores, valid=valid)


def test_each_bias_moves_by_the_rate_towards_balance() -> None:
    balancer = LossFree(rate=0.01)
    state = balancer.update(BalancerInput(routing=_routing([7, 3, 4, 2]), state=balancer.start(SHAPE)))
    torch.testing.assert_close(state["bias"], torch.tensor([-0.01, 0.01, 0.0, 0.01]))


def test_error_rule_moves_by_what_is_lacking_whatever_the_batch_size() -> None:
    balancer = LossFree(rate=0.1, rule="error")
    start = balancer.start(SHAPE)
    small = balancer.update(BalancerInput(routing=_routing([7, 3, 4, 2]), state=start))["bias"]
    torch.testing.assert_close(small, torch.tensor([-0.075, 0.025, 0.0, 0.05]))
    large = balancer.update(BalancerInput(routing=_routing([70, 30, 40, 20]), state=start))["bias"]
    torch.testing.assert_close(small, large)


def test_counts_of_the_whole_batch_decide() -> None:
    balancer = LossFree(rate=1.0)
    load = torch.tensor([1, 5, 1, 1])
    inputs = BalancerInput(routing=_routing([9, 0, 0, 0]), load=load, state=balancer.start(SHAPE))
    assert balancer.update(inputs)["bias"].tolist() == [1.0, -1.0, 1.0, 1.0]


def test_centered_biases_keep_their_differences_and_sum_to_nothing() -> None:
    states = []
    for centered in (False, True):
        balancer = LossFree(rate=0.01, centered=centered)
        state = balancer.start(SHAPE)
        for _ in range(5):
            state = balancer.update(BalancerInput(routing=_routing([7, 1, 1, 1]), state=state))
        states.append(state["bias"])
    torch.testing.assert_close(states[0] - states[0][0], states[1] - states[1][0])
    assert abs(states[1].sum().item()) < 1e-6 < states[0].sum().item()


def test_small_steps_add_up_under_bfloat16_scores() -> None:
    balancer = LossFree(rate=0.001)
    routing = sample_routing(hot=4.0)
    half = Routing.from_assignments(
        routing.token_ids,
        routing.expert_ids,
        routing.weights.bfloat16(),
        scores=routing.scores.bfloat16(),
        logits=routing.logits.bfloat16(),
        valid=routing.valid,
    )
    state = balancer.start(LayerShape(16, 8, 8))
    for _ in range(1000):
        state = balancer.update(BalancerInput(routing=half, state=state))
    assert abs(state["bias"][0].item() + 1.0) < 1e-3


def test_a_router_with_the_bias_becomes_even_and_keeps_its_weights() -> None:
    router = mixtura.create("routers", "top_k", SHAPE, top_k=1)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 16, generator=generator) + 0.7
    balancer = LossFree(rate=0.01)
    state = balancer.start(SHAPE)
    first = router(RouterInput.of(x, selection_bias=state["bias"]))
    for _ in range(200):
        routing = router(RouterInput.of(x, selection_bias=state["bias"]))
        state = balancer.update(BalancerInput(routing=routing, state=state))
    assert violation(first.load) > 0.8
    assert violation(routing.load) < 0.15
    torch.testing.assert_close(routing.scores, first.scores)
