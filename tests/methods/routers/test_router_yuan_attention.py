"""What the router yuan_attention promises beyond its kind's contract."""

from __future__ import annotations

import math

import torch

from mixtura.methods.routers.yuan_attention import YuanAttention
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=8, num_experts=5)


def test_equals_a_plain_loop_over_experts() -> None:
    router = YuanAttention(SHAPE, top_k=2)
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    routing = router(RouterInput.of(x))
    for token in range(12):
        given = (router.weight @ x[token]).tolist()
        query, key, value = given[:5], given[5:10], given[10:]
        logits = []
        for expert in range(5):
            powers = [math.exp(query[expert] * other) for other in key]
            mixed = sum(power * worth for power, worth in zip(powers, value, strict=True))
            logits.append(mixed / sum(powers))
        torch.testing.assert_close(routing.logits[token], torch.tensor(logits), atol=1e-5, rtol=1e-5)
        top = torch.tensor(logits).topk(2)
        mine = routing.token_ids == token
        assert set(routing.expert_ids[mine].tolist()) == set(top.indices.tolist())
        weights = dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))
        for expert, weight in zip(routing.expert_ids[mine], routing.weights[mine], strict=True):
            assert abs(weights[int(expert)] - weight.item()) < 1e-5


def test_one_experts_key_changes_the_others_logits() -> None:
    router = YuanAttention(SHAPE)
    x = torch.ones(1, 8)
    before = router(RouterInput.of(x)).logits.detach()
    with torch.no_grad():
        router.weight[5] += 1.0
    assert ((router(RouterInput.of(x)).logits - before).abs() > 1e-5).all()
