"""What the router expert_choice promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtura.methods.routers.expert_choice import ExpertChoice
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)


def tokens(count: int = 20) -> Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_each_expert_takes_its_best_tokens_of_each_sequence() -> None:
    router = ExpertChoice(SHAPE, capacity_factor=2.0)
    x, valid = tokens(), torch.arange(20) != 4
    ids = torch.tensor([0, 1] * 6 + [1] * 8)
    routing = router(RouterInput(x=x, valid=valid, sequence_ids=ids, training=True))
    scores = (x @ router.weight.T).softmax(-1)
    expected = set()
    for sequence in (0, 1):
        mine = ((ids == sequence) & valid).nonzero().squeeze(-1)
        room = -(-2 * mine.numel() // 4)
        for expert in range(4):
            best = mine[scores[mine, expert].topk(room).indices]
            expected |= {(int(token), expert) for token in best}
    assert set(zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True)) == expected
    torch.testing.assert_close(routing.weights, scores[routing.token_ids, routing.expert_ids])


def test_all_experts_are_equally_busy() -> None:
    routing = ExpertChoice(SHAPE, group="batch")(RouterInput.of(tokens() + 1, training=True))
    assert routing.load.tolist() == [10] * 4


def test_the_batch_is_one_group_if_asked_for() -> None:
    inputs = {"sequence_ids": torch.arange(20) // 10, "training": True}
    whole = ExpertChoice(SHAPE, group="batch")(RouterInput.of(tokens(), **inputs))
    alone = ExpertChoice(SHAPE)(RouterInput.of(tokens(), training=True))
    assert torch.equal(whole.token_ids, alone.token_ids)


def test_of_equal_scores_the_earlier_tokens_are_taken() -> None:
    routing = ExpertChoice(SHAPE, capacity_factor=1.0)(RouterInput.of(tokens(1).expand(8, -1), training=True))
    assert routing.token_ids.tolist() == [0, 1] * 4


def test_a_decoder_at_inference_lets_tokens_choose_an_encoder_does_not() -> None:
    router = ExpertChoice(SHAPE, capacity_factor=2.0)
    x = tokens()
    decoder = router(RouterInput.of(x))
    assert torch.bincount(decoder.token_ids).tolist() == [2] * 20
    encoder = router(RouterInput.of(x, causal=False))
    training = router(RouterInput.of(x, training=True))
    assert torch.equal(encoder.token_ids, training.token_ids)
    assert not torch.equal(decoder.token_ids, training.token_ids)


@pytest.mark.parametrize(("factor", "count"), [(1.0, 1), (1.5, 2), (2.5, 3), (3.5, 4), (3.49, 3)])
def test_a_half_is_rounded_up_at_inference(factor: float, count: int) -> None:
    router = ExpertChoice(SHAPE, capacity_factor=factor)
    x = torch.randn(10, SHAPE.d_model, generator=torch.Generator().manual_seed(0))
    assert torch.bincount(router(RouterInput.of(x)).token_ids).tolist() == [count] * 10
