"""What the router hyper_router promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.routers.hyper_router import HyperRouter
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=64, d_expert=8, num_experts=16)


def tokens() -> torch.Tensor:
    return torch.randn(10, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_rows_and_biases_come_from_the_hypernetwork() -> None:
    router = HyperRouter(SHAPE, top_k=3)
    table = (router.output @ (router.hidden @ router.embedding).clamp(min=0)).view(16, 65)
    x = tokens()
    logits = torch.cat([x, torch.ones(10, 1)], dim=1) @ table.T
    routing = router(RouterInput.of(x))
    torch.testing.assert_close(routing.logits, logits)
    found = torch.zeros(10, 16)
    found[routing.token_ids, routing.expert_ids] = routing.weights
    top = logits.topk(3)
    expected = torch.zeros(10, 16).scatter(-1, top.indices, top.values.softmax(-1))
    torch.testing.assert_close(found, expected)


def test_a_step_changes_the_rows_through_the_embedding_alone() -> None:
    router = HyperRouter(SHAPE)
    before = {name: value.detach().clone() for name, value in router.named_parameters()}
    rows = router.made()[0].detach().clone()
    optimizer = torch.optim.SGD([value for value in router.parameters() if value.requires_grad], lr=1.0)
    routing = router(RouterInput.of(tokens()))
    (routing.weights * routing.expert_ids).sum().backward()
    optimizer.step()
    changed = {name for name, value in router.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"embedding"}
    assert (router.made()[0] - rows).abs().max() > 1e-4


def test_the_hypernetwork_can_be_trained_too() -> None:
    router = HyperRouter(SHAPE, train_hypernet=True)
    assert all(value.requires_grad for value in router.parameters())


def test_rows_start_with_the_variance_of_a_plain_router() -> None:
    rows = HyperRouter(SHAPE).made()[0]
    assert 0.5 / 64 < rows.var().item() < 2 / 64
