"""What the router selective_sinkhorn promises beyond its kind's contract."""

from __future__ import annotations

from itertools import pairwise

import torch

from mixtura.methods.routers.selective_sinkhorn import SelectiveSinkhorn
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=8, num_experts=4)


def tokens(count: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, SHAPE.d_model, generator=generator) + 0.7


def test_solves_on_the_given_share_of_steps() -> None:
    for rate in (0.0, 0.05, 0.1, 0.3, 1.0):
        router = SelectiveSinkhorn(SHAPE, rate=rate)
        solved = [step for step in range(1000) if router.solves(step)]
        assert len(solved) == round(1000 * rate)
        gaps = {after - before for before, after in pairwise(solved)}
        assert len(gaps) <= 2, "the steps must be spread evenly"


def test_weights_are_rows_of_the_plan() -> None:
    router = SelectiveSinkhorn(SHAPE, top_k=2, rate=1.0, num_iterations=10, temperature=0.5)
    x = tokens()
    routing = router(RouterInput.of(x, training=True))
    plan = (x @ router.weight.detach().T / 0.5).double().exp()
    for _ in range(10):
        plan *= 40 / 4 / plan.sum(0)
        plan /= plan.sum(1, keepdim=True)
    torch.testing.assert_close(routing.scores.double(), plan, atol=1e-5, rtol=1e-4)
    top = plan.topk(2)
    expected = torch.zeros_like(plan).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))
    found = torch.zeros(40, 4)
    found[routing.token_ids, routing.expert_ids] = routing.weights.detach()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


def test_other_steps_and_inference_are_softmax() -> None:
    router = SelectiveSinkhorn(SHAPE, rate=0.5)
    x = tokens()
    probabilities = (x @ router.weight.detach().T).softmax(-1)
    for given in ({"training": True, "step": 0}, {"training": False, "step": 1}):
        torch.testing.assert_close(router(RouterInput.of(x, **given)).scores.detach(), probabilities)
    solved = router(RouterInput.of(x, training=True, step=1))
    assert (solved.scores - probabilities).abs().max() > 0.1
    assert solved.load.max() < router(RouterInput.of(x)).load.max()


def test_the_gradient_goes_through_the_iterations() -> None:
    router = SelectiveSinkhorn(SHAPE, rate=1.0).double()
    x = tokens(5).double().requires_grad_()

    def weights(x: torch.Tensor) -> torch.Tensor:
        return router(RouterInput.of(x, training=True)).weights

    assert torch.autograd.gradcheck(weights, (x,))
    (found,) = torch.autograd.grad(weights(x)[0], x)
    assert (found.abs().sum(-1) > 0).all(), "a token's plan depends on the other tokens"
