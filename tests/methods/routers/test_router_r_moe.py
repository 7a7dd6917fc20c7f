"""What the router r_moe promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods.routers.r_moe import RMoe
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)


def tokens(seed: int) -> torch.Tensor:
    return torch.randn(20, 16, generator=torch.Generator().manual_seed(seed))


def with_biases(router: RMoe) -> RMoe:
    with torch.no_grad():
        for seed, bias in enumerate((router.input_bias, router.hidden_bias)):
            bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(seed)))
    return router


def test_a_gru_shared_by_all_layers_carries_the_state() -> None:
    router = with_biases(RMoe(SHAPE, num_layers=3, num_dims=5))
    expected, state = torch.zeros(20, 5), None
    for layer in range(3):
        routing = router(RouterInput.of(tokens(layer), layer=layer, state=state))
        state = routing.state
        seen = tokens(layer) @ router.project[layer].T
        given = (seen @ router.input_weight.T + router.input_bias).split(5, dim=-1)
        before = (expected @ router.hidden_weight.T + router.hidden_bias).split(5, dim=-1)
        reset, update = torch.sigmoid(given[0] + before[0]), torch.sigmoid(given[1] + before[1])
        expected = (1 - update) * torch.tanh(given[2] + reset * before[2]) + update * expected
        torch.testing.assert_close(state, expected)
        torch.testing.assert_close(routing.logits, expected @ router.rows[layer].T)


def test_the_plain_recurrence() -> None:
    router = with_biases(RMoe(SHAPE, num_layers=2, num_dims=5, cell="rnn"))
    first = router(RouterInput.of(tokens(0)))
    second = router(RouterInput.of(tokens(1), layer=1, state=first.state))
    seen = tokens(1) @ router.project[1].T @ router.input_weight.T + router.input_bias
    expected = torch.tanh(seen + first.state @ router.hidden_weight.T + router.hidden_bias)
    torch.testing.assert_close(second.state, expected)


def test_the_state_goes_along_tokens_and_not_along_the_sequence() -> None:
    router = RMoe(SHAPE)
    first = router(RouterInput.of(tokens(0)))
    state = first.state.clone()
    state[7] += 1.0
    straight, moved = (
        router(RouterInput.of(tokens(1), layer=1, state=given)).logits for given in (first.state, state)
    )
    assert (straight != moved).any(-1).nonzero().flatten().tolist() == [7]


def test_weights_are_the_chosen_probabilities_over_their_sum() -> None:
    routing = RMoe(SHAPE, top_k=3)(RouterInput.of(tokens(0)))
    for token in range(20):
        mine = routing.token_ids == token
        best = routing.logits[token].topk(3)
        expected = torch.zeros(6).scatter(0, best.indices, best.values.softmax(-1))
        torch.testing.assert_close(routing.weights[mine], expected[routing.expert_ids[mine]])


def test_a_later_layers_routing_trains_what_an_earlier_layer_saw() -> None:
    router = RMoe(SHAPE, num_layers=2)
    layers = [MoELayer(router, Experts(SHAPE, seed=seed)) for seed in (0, 1)]
    output, routing = layers[0](RouterInput.of(tokens(0)))
    _, later = layers[1](RouterInput.of(tokens(0) + output.detach(), layer=1, state=routing.state))
    later.weights.square().sum().backward()
    assert router.project.grad is not None
    assert (router.project.grad.flatten(1).abs().sum(1) > 0).tolist() == [True, True]


def test_more_layers_than_it_is_made_for() -> None:
    with pytest.raises(UserError, match="made for 2 layers, got layer 2"):
        RMoe(SHAPE, num_layers=2)(RouterInput.of(tokens(0), layer=2))
