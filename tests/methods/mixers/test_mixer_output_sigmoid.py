"""What the mixer output_sigmoid promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.mixers.output_sigmoid import OutputSigmoid
from mixtura.modeling.layer import Experts
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=3)


def test_weights_of_zeros_are_half_of_the_sum() -> None:
    mixer, experts = OutputSigmoid(SHAPE), Experts(SHAPE).matrices
    with torch.no_grad():
        mixer.weight.zero_()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    output, _ = mixer(RouterInput.of(x), experts)
    everyone, experts_of = torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4)
    expected = experts.run(x, everyone, experts_of).view(4, 3, 8).sum(1) / 2
    torch.testing.assert_close(output, expected)


def test_an_output_decides_on_itself() -> None:
    mixer, experts = OutputSigmoid(SHAPE), Experts(SHAPE).matrices
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    output, routing = mixer(RouterInput.of(x), experts)
    made = experts.run(x, torch.zeros(3, dtype=torch.long), torch.arange(3))
    shares = torch.sigmoid((made * mixer.weight).sum(-1))
    torch.testing.assert_close(routing.scores[0], shares)
    torch.testing.assert_close(output[0], shares @ made)
