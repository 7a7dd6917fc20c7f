"""What the router sinkhorn promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.methods.routers.sinkhorn import Sinkhorn
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)


def tokens(count: int = 80, seed: int = 0) -> torch.Tensor:
    # A common offset makes one expert popular with all tokens.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, SHAPE.d_model, generator=generator) + 0.5


def plan(logits: torch.Tensor, num_iterations: int) -> torch.Tensor:
    """Columns to an equal share, then rows to 1, over and over, on plain numbers."""
    table = logits.double().exp()
    for _ in range(num_iterations):
        for column in range(table.shape[1]):
            table[:, column] *= table.shape[0] / table.shape[1] / table[:, column].sum()
        for row in range(table.shape[0]):
            table[row] /= table[row].sum()
    return table


@pytest.mark.parametrize("top_k", [1, 2])
def test_training_follows_the_plan_of_valid_tokens(top_k: int) -> None:
    router = Sinkhorn(SHAPE, top_k=top_k, num_iterations=20)
    x, valid = tokens(), torch.arange(80) < 64
    routing = router(RouterInput(x=x, valid=valid, training=True))
    logits = x @ router.weight.detach().T
    expected = plan(logits[:64], 20).topk(top_k).indices
    gates = logits.sigmoid() if top_k == 1 else logits.softmax(-1)
    for token in range(64):
        mine = routing.token_ids == token
        assert set(routing.expert_ids[mine].tolist()) == set(expected[token].tolist())
        torch.testing.assert_close(routing.weights[mine], gates[token][routing.expert_ids[mine]])


def test_training_is_balanced_and_inference_is_greedy() -> None:
    router = Sinkhorn(SHAPE, num_iterations=200, temperature=0.05)
    x = tokens()
    greedy = router(RouterInput.of(x))
    assert torch.equal(greedy.load, (x @ router.weight.T).argmax(-1).bincount(minlength=4))
    assert greedy.load.max() >= 30, "the case must be unbalanced"
    assert router(RouterInput.of(x, training=True)).load.max() <= 22


def test_the_plan_has_no_gradient() -> None:
    router = Sinkhorn(SHAPE)
    x = tokens(6).requires_grad_()
    routing = router(RouterInput.of(x, training=True))
    (found,) = torch.autograd.grad(routing.weights[0], x)
    assert found[routing.token_ids[0]].abs().sum() > 0
    others = torch.arange(6) != routing.token_ids[0]
    assert found[others].abs().sum() == 0
