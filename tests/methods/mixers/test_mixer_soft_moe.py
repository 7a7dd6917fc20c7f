"""What the mixer soft_moe promises beyond its kind's contract."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mixtura.methods.mixers.soft_moe import SoftMoe
from mixtura.modeling.layer import Experts
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=3)


def tokens() -> torch.Tensor:
    return torch.randn(10, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_slots_are_means_of_tokens_and_tokens_means_of_slots() -> None:
    mixer, experts = SoftMoe(SHAPE, slots=2), Experts(SHAPE)
    with torch.no_grad():
        mixer.scale.fill_(3.0)
    x = tokens()
    output, routing = mixer(RouterInput.of(x), experts.matrices)
    logits = F.normalize(x, dim=-1) @ (3 * F.normalize(mixer.phi, dim=-1)).T
    dispatch, combine = logits.softmax(0), logits.softmax(1)
    expected = torch.zeros_like(x)
    for slot in range(6):
        expert = slot // 2
        entering = (dispatch[:, slot, None] * x).sum(0)
        gate, up = (experts.gate_up_proj[expert] @ entering).chunk(2)
        expected += combine[:, slot, None] * (experts.down_proj[expert] @ (F.silu(gate) * up))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(routing.scores, combine.view(10, 3, 2).sum(-1))
    torch.testing.assert_close(routing.logits.softmax(-1), routing.scores)


def test_sequences_are_mixed_apart_and_padding_not_at_all() -> None:
    mixer, experts = SoftMoe(SHAPE), Experts(SHAPE).matrices
    x, ids = tokens(), torch.tensor([0, 1] * 5)
    valid = torch.arange(10) < 8
    output, _ = mixer(RouterInput(x=x, valid=valid, sequence_ids=ids), experts)
    for sequence in (0, 1):
        rows = ((ids == sequence) & valid).nonzero().squeeze(-1)
        alone, _ = mixer(RouterInput.of(x[rows]), experts)
        torch.testing.assert_close(output[rows], alone)
    assert (output[8:] == 0).all()
