"""What the mixer smear promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mixtura.methods.mixers.smear import Smear
from mixtura.modeling.layer import Experts
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=3)


def tokens() -> torch.Tensor:
    return torch.randn(10, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def trained(seed: int = 1) -> Smear:
    """A mixer whose every parameter is other than at the start."""
    mixer, generator = Smear(SHAPE), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return mixer


def by_hand(mixer: Smear, mean: torch.Tensor) -> torch.Tensor:
    """The logits of a sequence with this mean token, as the authors' router computes them."""

    def normed(row: torch.Tensor) -> torch.Tensor:
        deviation = ((row - row.mean()) ** 2).mean() + 1e-5
        return (row - row.mean()) / deviation.sqrt()

    token = normed(mean) * mixer.norm.weight + mixer.norm.bias
    products = [(token * normed(row) * mixer.row_scale).sum() for row in mixer.weight]
    return torch.stack(products) + mixer.bias


def test_one_merged_expert_computes_each_sequence() -> None:
    mixer, experts = trained(), Experts(SHAPE)
    x, ids = tokens(), torch.tensor([0] * 4 + [1] * 6)
    output, routing = mixer(RouterInput.of(x, sequence_ids=ids), experts.matrices)
    for sequence in (0, 1):
        mine = x[ids == sequence]
        mix = by_hand(mixer, mine.mean(0)).softmax(-1)
        up = (mix[:, None, None] * experts.gate_up_proj).sum(0)
        down = (mix[:, None, None] * experts.down_proj).sum(0)
        gate, features = (mine @ up.T).chunk(2, dim=-1)
        torch.testing.assert_close(output[ids == sequence], (F.silu(gate) * features) @ down.T)
        torch.testing.assert_close(routing.scores[ids == sequence], mix.expand(mine.shape[0], -1))


def test_the_mix_does_not_depend_on_the_scale_of_tokens() -> None:
    mixer, experts = trained(), Experts(SHAPE).matrices
    plain, larger = (mixer(RouterInput.of(scale * tokens()), experts)[1] for scale in (1.0, 1000.0))
    torch.testing.assert_close(plain.scores, larger.scores, rtol=1e-3, atol=1e-4)


def test_a_sure_router_runs_one_expert() -> None:
    mixer, experts = Smear(SHAPE), Experts(SHAPE).matrices
    x = tokens().abs()
    with torch.no_grad():
        mixer.bias.copy_(torch.tensor([-100.0, 100.0, -100.0]))
    output, _ = mixer(RouterInput.of(x), experts)
    expected = experts.run(x, torch.arange(10), torch.ones(10, dtype=torch.long))
    torch.testing.assert_close(output, expected)


def test_experts_are_left_out_in_training_and_the_rest_share_their_weight() -> None:
    mixer, experts = trained(), Experts(SHAPE).matrices
    x, ids = torch.randn(400, 8, generator=torch.Generator().manual_seed(3)), torch.arange(400)
    fields = {"sequence_ids": ids, "generator": torch.Generator().manual_seed(4)}
    whole = mixer(RouterInput.of(x, **fields), experts)[1].scores
    _, routing = mixer(RouterInput.of(x, training=True, **fields), experts)
    kept = routing.scores > 0
    torch.testing.assert_close(routing.scores, whole * kept / (whole * kept).sum(-1, keepdim=True))
    torch.testing.assert_close(routing.scores, routing.logits.softmax(-1))
    # 1200 draws; where all would be left out none is, a thousandth of them.
    assert (~kept).float().mean().item() == pytest.approx(0.1, abs=4 * 0.3 / 1200**0.5)
