"""What the mixer smear promises beyond its kind's contract."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mixtura.methods.mixers.smear import Smear
from mixtura.modeling.layer import Experts
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=3)


def tokens() -> torch.Tensor:
    return torch.randn(10, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_one_merged_expert_computes_each_sequence() -> None:
    mixer, experts = Smear(SHAPE), Experts(SHAPE)
    x, ids = tokens(), torch.tensor([0] * 4 + [1] * 6)
    output, routing = mixer(RouterInput.of(x, sequence_ids=ids), experts.matrices)
    for sequence in (0, 1):
        mine = x[ids == sequence]
        mix = (mixer.weight @ mine.mean(0)).softmax(-1)
        up = (mix[:, None, None] * experts.gate_up_proj).sum(0)
        down = (mix[:, None, None] * experts.down_proj).sum(0)
        gate, features = (mine @ up.T).chunk(2, dim=-1)
        torch.testing.assert_close(output[ids == sequence], (F.silu(gate) * features) @ down.T)
        torch.testing.assert_close(routing.scores[ids == sequence], mix.expand(mine.shape[0], -1))


def test_a_sure_router_runs_one_expert() -> None:
    mixer, experts = Smear(SHAPE), Experts(SHAPE).matrices
    x = tokens().abs()
    with torch.no_grad():
        mixer.weight.copy_(torch.tensor([-100.0, 100.0, -100.0])[:, None].expand(-1, 8))
    output, _ = mixer(RouterInput.of(x), experts)
    expected = experts.run(x, torch.arange(10), torch.ones(10, dtype=torch.long))
    torch.testing.assert_close(output, expected)
