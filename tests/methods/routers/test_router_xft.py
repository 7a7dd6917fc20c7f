"""The shared expert's weight, and those of the others, beside a plain loop."""

from __future__ import annotations

import math

import pytest
import torch

from mixtura.errors import SettingError
from mixtura.methods.routers.xft import Xft
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=12, d_expert=8, num_experts=6)


def tokens(count: int = 15) -> torch.Tensor:
    return 5 * torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("top_k", [2, 4, 6])
@torch.no_grad()
def test_equals_a_plain_loop(top_k: int) -> None:
    router, x = Xft(SHAPE, top_k=top_k, coefficient=0.5), tokens()
    routing = router(RouterInput.of(x))
    summed = [0.0] * 5
    for token in range(len(x)):
        gates = (router.outer @ torch.tanh(router.inner @ x[token])).tolist()
        whole = sum(math.exp(g) for g in gates)
        p = [math.exp(g) / whole for g in gates]
        chosen = sorted(range(5), key=lambda e, p=p: -p[e])[: top_k - 1]
        below = sum(math.exp(p[e]) for e in chosen)
        wanted = {0: 1 - p[chosen[0]]}
        wanted |= {e + 1: p[chosen[0]] * math.exp(p[e]) / below for e in chosen}
        mine = routing.token_ids == token
        found = dict(zip(routing.expert_ids[mine].tolist(), routing.weights[mine].tolist(), strict=True))
        assert found == pytest.approx(wanted, abs=1e-5)
        assert sum(found.values()) == pytest.approx(1, abs=1e-5)
        assert routing.scores[token].tolist() == pytest.approx([0.5, *(q / 2 for q in p)], abs=1e-5)
        for e in chosen:
            summed[e] += p[e]
    mean = sum(summed) / 5
    loss = 0.5 * sum((s - mean) ** 2 for s in summed) / 5 / mean**2
    assert float(routing.losses["importance"]) == pytest.approx(loss, rel=1e-4)


@torch.no_grad()
def test_a_sure_router_leaves_the_shared_expert_out() -> None:
    router = Xft(SHAPE)
    router.inner.zero_()[0, 0] = 10.0
    router.outer.zero_()[3, 0] = 50.0
    x = torch.zeros(1, SHAPE.d_model)
    x[0, 0] = 1.0
    routing = router(RouterInput.of(x))
    weights = dict(zip(routing.expert_ids.tolist(), routing.weights.tolist(), strict=True))
    assert weights == pytest.approx({0: 0.0, 4: 1.0}, abs=1e-6)


def test_one_expert_a_token_is_the_shared_one() -> None:
    for shape in (SHAPE, LayerShape(d_model=12, d_expert=8, num_experts=1)):
        routing = Xft(shape, top_k=1)(RouterInput.of(tokens(3)))
        assert routing.expert_ids.tolist() == [0, 0, 0]
        assert routing.weights.tolist() == [1, 1, 1]
    with pytest.raises(SettingError, match="top_k"):
        Xft(SHAPE, top_k=7)
