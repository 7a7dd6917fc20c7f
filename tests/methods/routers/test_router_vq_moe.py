"""What the router vq_moe promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mixtura.methods.routers.vq_moe import VqMoe
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)


def tokens(count: int = 20) -> Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def made(num_codes: int = 30, **settings: float) -> VqMoe:
    """A router whose codebook and norm are far from their start."""
    router = VqMoe(SHAPE, num_codes=num_codes, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        router.codes.copy_(torch.randn(num_codes, 16, generator=generator))
        router.norm_weight.copy_(torch.rand(16, generator=generator) + 0.5)
        router.norm_bias.copy_(torch.randn(16, generator=generator))
        router.mix_bias.copy_(torch.tensor([0.3, -0.2]))
    return router


@pytest.mark.parametrize("contribution", [1.0, 0.25])
def test_output_by_a_plain_loop(contribution: float) -> None:
    router, experts = made(contribution=contribution), Experts(SHAPE)
    x = tokens()
    output, _ = MoELayer(router, experts)(RouterInput.of(x))

    def run(row: Tensor, expert: int) -> Tensor:
        gate, up = (experts.gate_up_proj[expert] @ row).chunk(2)
        return experts.down_proj[expert] @ (F.silu(gate) * up)

    def normed(row: Tensor) -> Tensor:
        standard = (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt()
        return standard * router.norm_weight + router.norm_bias

    used = set()
    for token in range(20):
        code = min(range(30), key=lambda c: (x[token] - router.codes[c]).norm().item())
        q = (1 - contribution) * x[token] + contribution * router.codes[code]
        branch = normed(run(normed(q), code % 4))
        best = (router.weight @ x[token]).softmax(0).topk(2)
        shares = best.values / best.values.sum()
        routed = sum(w * run(x[token], int(e)) for w, e in zip(shares, best.indices, strict=True))
        first, second = (router.mix @ x[token] + router.mix_bias).softmax(0)
        torch.testing.assert_close(output[token], first * routed + second * branch)
        used.add(code % 4)
    assert len(used) > 2


def test_tokens_of_one_code_meet_one_expert_and_one_value() -> None:
    router, experts = made(), Experts(SHAPE)
    near = router.codes[7].detach() + 1e-3 * tokens(6)
    routing = router(RouterInput.of(near, experts=experts.matrices))
    mix = (near @ router.mix.T + router.mix_bias).softmax(-1)
    values = routing.extra / mix[:, 1:]
    torch.testing.assert_close(values, values[:1].expand(6, -1))


def test_loss_by_hand_and_where_its_gradient_goes() -> None:
    router = made(commitment=0.5, coefficient=3.0)
    x = tokens().requires_grad_()
    routing = router(RouterInput.of(x, experts=Experts(SHAPE).matrices, training=True))
    gaps = (x[:, None] - router.codes[None]).square().sum(-1)
    nearest = gaps.min(-1)
    expected = 3.0 * 1.5 * nearest.values.mean() / 16
    torch.testing.assert_close(routing.losses["codes"], expected)
    by_x, by_codes = torch.autograd.grad(routing.losses["codes"], (x, router.codes))
    away = x - router.codes[nearest.indices]
    torch.testing.assert_close(by_x, 3.0 * 0.5 * 2 * away / (16 * 20))
    pulled = torch.zeros_like(by_codes).index_add(0, nearest.indices, -3.0 * 2 * away / (16 * 20))
    torch.testing.assert_close(by_codes, pulled)


def test_the_gradient_of_the_branch_passes_straight_through() -> None:
    router = made()
    x = tokens().requires_grad_()
    with torch.no_grad():
        router.mix.zero_()
    routing = router(RouterInput.of(x, experts=Experts(SHAPE).matrices))
    (slope,) = torch.autograd.grad(routing.extra.sum(), x)
    assert (slope.abs().sum(-1) > 0).all()


def test_padding_does_not_count() -> None:
    router, experts = made(), Experts(SHAPE).matrices
    valid = torch.arange(20) < 12
    x = torch.where(valid[:, None], tokens(), torch.nan)
    padded = router(RouterInput(x=x, valid=valid, experts=experts, training=True))
    alone = router(RouterInput.of(tokens()[:12], experts=experts, training=True))
    assert not router(RouterInput.of(tokens(), experts=experts)).losses
    torch.testing.assert_close(padded.losses["codes"], alone.losses["codes"])
    torch.testing.assert_close(padded.extra[:12], alone.extra)
    assert (padded.extra[12:] == 0).all()
