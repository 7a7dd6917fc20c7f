"""What the router mixture_of_routers promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.routers.mixture_of_routers import MixtureOfRouters
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)


def tokens() -> torch.Tensor:
    return torch.randn(20, 16, generator=torch.Generator().manual_seed(0))


def test_scores_are_the_sub_routers_weighted_by_the_main_one() -> None:
    router = MixtureOfRouters(SHAPE, num_routers=4)
    routing = router(RouterInput.of(tokens()))
    for token, x in enumerate(tokens()):
        say = (router.main @ x).softmax(-1)
        expected = sum(say[r] * (router.routers[r] @ x).softmax(-1) for r in range(4))
        torch.testing.assert_close(routing.scores[token], expected)
        mine = routing.token_ids == token
        best = expected.topk(2)
        wanted = torch.zeros(6).scatter(0, best.indices, best.values / best.values.sum())
        torch.testing.assert_close(routing.weights[mine], wanted[routing.expert_ids[mine]])


def test_mixed_logits() -> None:
    router = MixtureOfRouters(SHAPE, num_routers=2, mix="logits")
    routing = router(RouterInput.of(tokens()))
    say = (tokens() @ router.main.T).softmax(-1)
    expected = say[:, :1] * (tokens() @ router.routers[0].T) + say[:, 1:] * (tokens() @ router.routers[1].T)
    torch.testing.assert_close(routing.logits, expected)
    torch.testing.assert_close(routing.scores, expected.softmax(-1))


def test_one_sub_router_is_an_ordinary_router() -> None:
    router = MixtureOfRouters(SHAPE, num_routers=1)
    expected = (tokens() @ router.routers[0].T).softmax(-1)
    torch.testing.assert_close(router(RouterInput.of(tokens())).scores, expected)


def test_one_mistaken_sub_router_is_outvoted() -> None:
    router = MixtureOfRouters(LayerShape(d_model=2, d_expert=8, num_experts=3), top_k=1, num_routers=3)
    with torch.no_grad():
        router.main.zero_()
        router.routers.zero_()
        router.routers[:2, 1] = 3.0
        router.routers[2, 0] = 3.0
    x = RouterInput.of(torch.ones(1, 2))
    assert router(x).expert_ids.tolist() == [1]
    with torch.no_grad():
        # Unless the main router trusts it.
        router.main[2] = 5.0
    assert router(x).expert_ids.tolist() == [0]
