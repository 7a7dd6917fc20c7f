"""What the router moe_plus_plus promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods.routers.moe_plus_plus import MoePlusPlus
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(40, SHAPE.d_model, generator=torch.Generator().manual_seed(seed))


def test_output_by_a_plain_loop_over_all_kinds_of_experts() -> None:
    router, experts = MoePlusPlus(SHAPE), Experts(SHAPE)
    x = tokens()
    output, _ = MoELayer(router, experts)(RouterInput.of(x))
    scores = ((x @ router.inner.T).tanh() @ router.gate.T).softmax(-1)
    seen = set()
    for token in range(40):
        best = scores[token].topk(2).indices.tolist()
        raw = {e: scores[token, e].item() if e != 7 else 0.0 for e in best}
        expected = torch.zeros(16)
        for expert in best:
            weight = raw[expert] / sum(raw.values())
            if expert < 4:
                ids = torch.tensor([expert])
                made = experts.matrices.run(x[token : token + 1], torch.zeros_like(ids), ids)[0]
            elif expert < 6:
                first, second = (router.mix[expert - 4] @ x[token]).softmax(0)
                made = first * x[token] + second * router.constant[expert - 4]
            else:
                made = x[token] if expert == 6 else torch.zeros(16)
            expected = expected + weight * made
            seen.add(expert)
        torch.testing.assert_close(output[token], expected)
    assert seen == set(range(8))


def test_the_partner_of_a_zero_expert_has_weight_1() -> None:
    router = MoePlusPlus(SHAPE)
    routing = router(RouterInput.of(tokens()))
    best = ((tokens() @ router.inner.T).tanh() @ router.gate.T).topk(2).indices
    partners = (best == 7).any(-1) & (best < 4).any(-1)
    assert partners.any()
    for token in partners.nonzero().squeeze(-1).tolist():
        assert routing.weights[routing.token_ids == token].tolist() == [1.0]


def test_the_gate_goes_on_from_the_logits_of_the_layer_before() -> None:
    first, second = MoePlusPlus(SHAPE, seed=1), MoePlusPlus(SHAPE, seed=7)
    state = first(RouterInput.of(tokens())).state
    routing = second(RouterInput.of(tokens(1), layer=1, state=state))
    alone = second(RouterInput.of(tokens(1))).state
    torch.testing.assert_close(routing.state, alone + state @ second.residual.T)
    with pytest.raises(UserError, match="a state of 8 logits a token"):
        second(RouterInput.of(tokens(), state=torch.zeros(40, 4)))


def test_balance_loss_by_hand_weighs_what_computes_nothing_by_tau() -> None:
    router = MoePlusPlus(SHAPE, tau=0.5, coefficient=2.0)
    found = router(RouterInput.of(tokens())).losses["balance"].item()
    scores = ((tokens() @ router.inner.T).tanh() @ router.gate.T).softmax(-1)
    chosen = scores.topk(2).indices
    expected = 0.0
    for expert in range(8):
        share = (chosen == expert).sum().item() / 80
        mean = sum(row[expert] for row in scores.tolist()) / 40
        expected += 2.0 * 8 * (1.0 if expert < 4 else 0.5) * share * mean
    assert math.isclose(found, expected, rel_tol=1e-5)


def test_without_free_experts_it_is_top_k_of_its_gate() -> None:
    router = MoePlusPlus(SHAPE, num_constant=0, num_copy=0, num_zero=0)
    routing = router(RouterInput.of(tokens()))
    assert torch.bincount(routing.token_ids).tolist() == [2] * 40
    assert (routing.extra == 0).all()
