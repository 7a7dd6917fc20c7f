"""What the router base_layer promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.routers.base_layer import BaseLayer
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)


def tokens(count: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, SHAPE.d_model, generator=generator) + 1


def test_training_fills_experts_equally_with_valid_tokens() -> None:
    router = BaseLayer(SHAPE)
    valid = torch.arange(60) % 3 > 0
    routing = router(RouterInput(x=tokens(), valid=valid, training=True))
    assert routing.load.tolist() == [10, 10, 10, 10]
    assert sorted(routing.token_ids.tolist()) == valid.nonzero().squeeze(-1).tolist()


def test_no_exchange_of_two_tokens_is_better() -> None:
    router = BaseLayer(SHAPE, tolerance=1e-6)
    x = tokens()
    routing = router(RouterInput.of(x, training=True))
    affinity = x @ router.weight.detach().T
    owner = torch.empty(60, dtype=torch.long)
    owner[routing.token_ids] = routing.expert_ids
    kept = affinity.gather(1, owner[:, None])
    swapped = affinity[:, owner]
    gain = swapped + swapped.T - kept - kept.T
    assert gain.max() < 1e-4
    assert (affinity.argmax(-1) != owner).any(), "the case must need balancing"


def test_inference_is_greedy_and_weights_are_sigmoids() -> None:
    router = BaseLayer(SHAPE)
    x = tokens()
    affinity = x @ router.weight.T
    routing = router(RouterInput.of(x))
    assert torch.equal(routing.expert_ids, affinity.argmax(-1)[routing.token_ids])
    for training in (False, True):
        routing = router(RouterInput.of(x, training=training))
        expected = affinity[routing.token_ids, routing.expert_ids].sigmoid()
        torch.testing.assert_close(routing.weights, expected)


def test_centroids_start_orthogonal() -> None:
    weight = BaseLayer(SHAPE).weight.detach()
    torch.testing.assert_close(weight @ weight.T, 0.01 * torch.eye(4))
