"""What the router dense_to_sparse promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.methods.routers.dense_to_sparse import DenseToSparse
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)


def tokens() -> torch.Tensor:
    return torch.randn(40, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_temperature_falls_geometrically_and_stays() -> None:
    router = DenseToSparse(SHAPE, start=4.0, end=0.25, num_steps=4)
    temperatures = [router.temperature(step) for step in (0, 1, 2, 4, 100)]
    assert temperatures == pytest.approx([4.0, 2.0, 1.0, 0.25, 0.25])


@pytest.mark.parametrize("activation", ["none", "sigmoid", "tanh", "gelu"])
def test_weights_by_a_plain_loop(activation: str) -> None:
    router = DenseToSparse(SHAPE, start=0.5, end=0.5, threshold=0.9, activation=activation)
    routing = router(RouterInput.of(tokens()))
    logits = tokens() @ router.weight.T
    activated = {
        "none": logits,
        "sigmoid": 1 / (1 + torch.exp(-logits)),
        "tanh": 2 / (1 + torch.exp(-2 * logits)) - 1,
        "gelu": logits * (1 + torch.erf(logits / 2**0.5)) / 2,
    }[activation]
    scores = torch.exp(activated / 0.5)
    scores = scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.scores, scores)
    for token in range(40):
        kept = [e for e in range(6) if scores[token, e] >= 0.15 or scores[token, e] == scores[token].max()]
        mine = routing.token_ids == token
        assert routing.expert_ids[mine].tolist() == kept
        torch.testing.assert_close(routing.weights[mine], scores[token, kept] / scores[token, kept].sum())


def test_starts_dense_and_ends_sparse() -> None:
    router = DenseToSparse(SHAPE, start=2.0, end=0.02, num_steps=100)
    used = [router(RouterInput.of(tokens(), step=step)).load.sum().item() for step in (0, 50, 100)]
    assert used[0] == 6 * 40
    assert used[0] > used[1] > used[2]
    assert used[2] < 1.6 * 40


def test_without_activation_temperature_and_weights_are_one_parameter_with_it_they_are_two() -> None:
    for activation, tied in (("none", True), ("sigmoid", False), ("tanh", False)):
        small = DenseToSparse(SHAPE, start=1.0, end=1.0, activation=activation)
        large = DenseToSparse(SHAPE, start=2.0, end=2.0, activation=activation)
        with torch.no_grad():
            large.weight.mul_(2.0)
        scores = [router(RouterInput.of(tokens())).scores for router in (small, large)]
        assert torch.allclose(*scores, atol=1e-6) == tied


def test_the_most_probable_expert_is_used_whatever_the_threshold() -> None:
    routing = DenseToSparse(SHAPE, start=2.0, threshold=6.0)(RouterInput.of(tokens()))
    assert torch.equal(routing.token_ids.sort().values, torch.arange(40))
    assert torch.equal(routing.scores.argmax(-1)[routing.token_ids], routing.expert_ids)


@pytest.mark.parametrize("num_experts", [2, 8, 24, 64, 128])
def test_any_number_of_experts_begins_dense_and_ends_sparse(num_experts: int) -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    router = DenseToSparse(LayerShape(64, 8, num_experts))
    used = [router(RouterInput.of(x, step=step)).load.sum().item() / 200 for step in (0, 500, 1000)]
    assert used[0] == num_experts
    assert used[0] >= used[1] >= used[2]
    assert used[2] < 0.8 * num_experts
