"""What the router thor promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods.routers.thor import Thor
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=2, d_expert=8, num_experts=4)
SEQUENCES = torch.arange(3).repeat_interleave(400)


def experts(router: Thor, training: bool, seed: int) -> torch.Tensor:
    inputs = RouterInput.of(
        torch.zeros(1200, 2),
        training=training,
        sequence_ids=SEQUENCES,
        generator=torch.Generator().manual_seed(seed),
    )
    routing = router(inputs)
    assert (routing.weights == 1).all()
    return routing.expert_ids[routing.token_ids.argsort()]


def test_training_draws_one_expert_a_pass() -> None:
    drawn = [experts(Thor(SHAPE), True, seed) for seed in range(40)]
    assert all(len(chosen.unique()) == 1 for chosen in drawn)
    assert len(torch.stack(drawn).unique()) == 4


def test_levels() -> None:
    by_sequence = Thor(SHAPE, training_level="sequence", inference_level="sequence")
    for training in (True, False):
        drawn = torch.stack([experts(by_sequence, training, seed) for seed in range(10)])
        for sequence in range(3):
            mine = drawn[:, sequence == SEQUENCES]
            assert (mine == mine[:, :1]).all()
        assert (drawn[:, 0] != drawn[:, -1]).any()
    for router, training in ((Thor(SHAPE), False), (Thor(SHAPE, training_level="token"), True)):
        counts = experts(router, training, 0).bincount(minlength=4)
        assert (counts - 300).abs().max() < 75, "four standard deviations or more"


def test_consistency_is_the_mean_symmetric_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 6, 10, generator=generator)
    left, right = first.softmax(-1), second.softmax(-1)
    expected = sum(
        0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
        for p, q in zip(left, right, strict=True)
    )
    router = Thor(SHAPE, consistency_coefficient=3.0)
    torch.testing.assert_close(router.consistency(first, second), 3 * expected / 6)
    torch.testing.assert_close(router.consistency(second, first), 3 * expected / 6)
    assert router.consistency(first, first).abs() < 1e-6
    assert router.consistency(first[:0], second[:0]) == 0


def test_experts_take_turns_without_a_generator() -> None:
    routing = Thor(SHAPE)(RouterInput.of(torch.zeros(8, 2), positions=torch.arange(8), layer=1))
    assert routing.expert_ids[routing.token_ids.argsort()].tolist() == [1, 2, 3, 0, 1, 2, 3, 0]
    with pytest.raises(UserError, match="positions"):
        Thor(SHAPE)(RouterInput.of(torch.zeros(8, 2)))
