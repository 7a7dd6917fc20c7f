"""What the router rectify_router promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import SettingError
from mixtura.methods.routers.rectify_router import RectifyRouter
from mixtura.types import LayerShape, RouterInput, Routing

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)
SEQUENCES = torch.arange(4).repeat_interleave(12)


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(48, SHAPE.d_model, generator=generator) + 0.6


def routed(**settings: object) -> tuple[RectifyRouter, Routing, torch.Tensor]:
    router = RectifyRouter(SHAPE, **settings)
    valid = torch.arange(48) % 8 > 0
    given = RouterInput(x=tokens(), valid=valid, sequence_ids=SEQUENCES, training=True)
    return router, router(given), valid


def by_hand(router: RectifyRouter, valid: torch.Tensor) -> torch.Tensor:
    """Which token goes to which expert, one assignment after another."""
    scores = (tokens() @ router.weight.detach().T).softmax(-1)
    capacity = -(-int(router.capacity_factor * router.top_k * valid.sum()) // 6)
    placed = torch.zeros(48, 6, dtype=torch.bool)
    wanted = torch.zeros_like(placed)
    dropped = [0] * 48
    for token in valid.nonzero().squeeze(-1).tolist():
        for expert in scores[token].topk(router.top_k).indices.tolist():
            wanted[token, expert] = True
            if placed[:, expert].sum() < capacity:
                placed[token, expert] = True
            else:
                dropped[token] += 1
    if router.fill_in:
        for expert in range(6):
            for token in scores[:, expert].argsort(descending=True).tolist():
                if valid[token] and not wanted[token, expert] and placed[:, expert].sum() < capacity:
                    placed[token, expert] = True
    if router.intra_gpu:
        size = 6 // router.num_gpus
        for token in range(48):
            gpu = int(SEQUENCES[token]) * router.num_gpus // 4
            order = [e for e in scores[token].argsort(descending=True).tolist() if e // size == gpu]
            for expert in [e for e in order if not placed[token, e]][: dropped[token]]:
                placed[token, expert] = True
    return placed


@pytest.mark.parametrize("intra_gpu", [True, False])
@pytest.mark.parametrize("fill_in", [True, False])
@pytest.mark.parametrize("top_k", [1, 2])
def test_equals_a_plain_loop(intra_gpu: bool, fill_in: bool, top_k: int) -> None:
    router, routing, valid = routed(intra_gpu=intra_gpu, fill_in=fill_in, top_k=top_k, num_gpus=2)
    found = torch.zeros(48, 6, dtype=torch.bool)
    found[routing.token_ids, routing.expert_ids] = True
    assert torch.equal(found, by_hand(router, valid))
    torch.testing.assert_close(routing.weights, routing.scores[routing.token_ids, routing.expert_ids])
    assert routing.demand is not None
    assert routing.demand.sum() == top_k * valid.sum()
    assert routing.demand.max() > -(-top_k * 42 // 6), "the case must overflow"


def test_no_token_is_lost_and_no_place_left_empty() -> None:
    _, plain, valid = routed(intra_gpu=False, fill_in=False)
    _, rectified, _ = routed()
    assert plain.token_ids.unique().numel() < valid.sum()
    assert rectified.token_ids.unique().numel() == valid.sum()
    assert plain.load.min() < 7 <= rectified.load.min()


def test_a_decoder_at_inference_is_plain_top_k() -> None:
    router = RectifyRouter(SHAPE, top_k=2, capacity_factor=0.5)
    whole = router(RouterInput.of(tokens(), sequence_ids=SEQUENCES))
    assert torch.bincount(whole.token_ids).unique().tolist() == [2]
    table = torch.zeros(48, 6, dtype=torch.bool)
    table[whole.token_ids, whole.expert_ids] = True
    expected = torch.zeros_like(table).scatter(1, (tokens() @ router.weight.T).topk(2).indices, True)
    assert torch.equal(table, expected)
    limited = router(RouterInput.of(tokens(), sequence_ids=SEQUENCES, causal=False))
    assert limited.token_ids.numel() != whole.token_ids.numel() or not torch.equal(
        limited.expert_ids, whole.expert_ids
    )


def test_one_sequence_has_experts_on_every_gpu() -> None:
    router = RectifyRouter(SHAPE, capacity_factor=0.25, fill_in=False)
    routing = router(RouterInput.of(tokens(), training=True))
    assert (routing.load[:3].sum() - routing.load[3:].sum()).abs() <= 12
    assert routing.demand is not None
    assert not torch.equal(routing.load, routing.demand)


def test_gpus_must_divide_the_experts() -> None:
    with pytest.raises(SettingError, match="must divide the 6 experts"):
        RectifyRouter(SHAPE, num_gpus=4)
