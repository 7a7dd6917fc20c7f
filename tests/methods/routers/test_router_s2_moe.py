"""What the router s2_moe promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixtura.methods.routers._losses import contrast
from mixtura.methods.routers.s2_moe import S2Moe
from mixtura.methods.routers.top_k import TopK
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)


def tokens(count: int = 20) -> Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def plain(router: S2Moe, experts: Experts, x: Tensor) -> Tensor:
    """The output of an ordinary top-k layer with the same rows."""
    same = TopK(SHAPE, top_k=router.top_k)
    with torch.no_grad():
        same.weight.copy_(router.weight)
    return MoELayer(same, experts)(RouterInput.of(x))[0]


def test_output_is_the_gated_mixture_of_the_clean_and_the_noised_token() -> None:
    router, experts = S2Moe(SHAPE, scale_noise=0.3, shift_noise=0.5), Experts(SHAPE)
    generator = torch.Generator().manual_seed(1)
    x = tokens()
    output, _ = MoELayer(router, experts)(RouterInput.of(x, training=True, generator=generator.clone_state()))
    first, second = (torch.randn(20, 16, generator=generator) for _ in range(2))
    noised = x * (1 + 0.3 * first) + 0.5 * second
    gate = torch.sigmoid(x @ router.gate.T)
    expected = gate * plain(router, experts, x) + (1 - gate) * plain(router, experts, noised)
    torch.testing.assert_close(output, expected)


def test_without_noise_both_branches_are_the_plain_layer() -> None:
    router, experts = S2Moe(SHAPE, scale_noise=0.0, shift_noise=0.0), Experts(SHAPE)
    inputs = RouterInput.of(tokens(), training=True, generator=torch.Generator())
    torch.testing.assert_close(MoELayer(router, experts)(inputs)[0], plain(router, experts, tokens()))


def test_inference_is_clean_and_may_use_fewer_experts() -> None:
    for count in (1, 2):
        router = S2Moe(SHAPE, top_k=2, inference_top_k=count)
        routing = router(RouterInput.of(tokens(), generator=torch.Generator()))
        assert torch.bincount(routing.token_ids).tolist() == [count] * 20
        assert routing.extra is None
        assert not routing.losses


def test_contrast_by_hand() -> None:
    first, second = tokens(5), tokens(10)[5:]
    expected = 0.0
    for i in range(5):
        alike = [float(torch.cosine_similarity(first[i], second[j], dim=0)) / 0.2 for j in range(5)]
        expected += math.log(sum(math.exp(a) for a in alike)) - alike[i]
    assert contrast(first, second, 0.2).item() == pytest.approx(expected / 5, rel=1e-5)
    blocks = (2 * contrast(first[:2], second[:2], 0.2) + 2 * contrast(first[2:4], second[2:4], 0.2)) / 5
    torch.testing.assert_close(contrast(first, second, 0.2, block=2), blocks)
    assert contrast(first[:0], second[:0], 0.2).item() == 0


def test_the_loss_is_of_the_two_outputs_and_less_for_less_noise() -> None:
    experts = Experts(SHAPE)
    losses = []
    for noise in (0.0, 0.2, 2.0):
        router = S2Moe(SHAPE, scale_noise=noise, shift_noise=noise, coefficient=1.0)
        generator = torch.Generator().manual_seed(1)
        inputs = RouterInput.of(tokens(), training=True, generator=generator, experts=experts.matrices)
        losses.append(router(inputs).losses["uncertainty"].item())
        if noise == 0:
            clean = plain(router, experts, tokens())
            assert losses[0] == pytest.approx(contrast(clean, clean, 0.1).item(), rel=1e-4)
    assert losses[0] < losses[1] < losses[2]


def test_padding_enters_neither_branch_nor_loss() -> None:
    router, experts = S2Moe(SHAPE), Experts(SHAPE).matrices
    x, valid = tokens(), torch.arange(20) < 12
    found = []
    for values in (x, torch.where(valid[:, None], x, torch.nan)):
        generator = torch.Generator().manual_seed(1)
        inputs = RouterInput(x=values, valid=valid, training=True, generator=generator, experts=experts)
        found.append(router(inputs))
    assert torch.equal(found[0].losses["uncertainty"], found[1].losses["uncertainty"])
    assert torch.equal(found[0].extra, found[1].extra)
