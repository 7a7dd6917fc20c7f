"""What the router vmoe promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch

from mixtura.methods.routers.vmoe import Vmoe
from mixtura.modeling.layer import Experts, MoELayer
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=4)


def tokens(count: int = 30) -> torch.Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0)) + 0.3


@pytest.mark.parametrize("priority", ["best", "sum", "arrival"])
def test_room_is_given_by_priority_and_first_choices_first_by_a_plain_loop(priority: str) -> None:
    router = Vmoe(SHAPE, top_k=2, capacity_factor=0.6, priority=priority)
    valid = torch.arange(30) % 7 != 3
    routing = router(RouterInput(x=tokens(), valid=valid, causal=False))
    scores = (tokens() @ router.weight.T).softmax(-1).detach()
    best = scores.topk(2)
    rated = {
        "best": best.values[:, 0],
        "sum": best.values.sum(-1),
        "arrival": torch.zeros(30),
    }[priority].tolist()
    queue = sorted(valid.nonzero().squeeze(-1).tolist(), key=lambda token: -rated[token])
    room = math.ceil(0.6 * 2 * len(queue) / 4)
    taken: list[list[int]] = [[], [], [], []]
    for choice in range(2):
        for token in queue:
            expert = int(best.indices[token, choice])
            if len(taken[expert]) < room:
                taken[expert].append(token)
    found = [sorted(routing.token_ids[routing.expert_ids == e].tolist()) for e in range(4)]
    assert found == [sorted(mine) for mine in taken]
    assert sum(map(len, taken)) < 2 * len(queue), "the case must drop some"
    torch.testing.assert_close(routing.weights, scores[routing.token_ids, routing.expert_ids])
    assert routing.demand.sum() == 2 * len(queue)


def test_with_half_the_room_the_surest_tokens_stay() -> None:
    routing = Vmoe(SHAPE, top_k=1, capacity_factor=0.5)(RouterInput.of(tokens(), causal=False))
    sure = routing.scores.max(-1).values
    for expert in range(4):
        wanted = routing.scores.argmax(-1) == expert
        kept = torch.zeros(30, dtype=torch.bool)
        kept[routing.token_ids[routing.expert_ids == expert]] = True
        if kept.any() and (wanted & ~kept).any():
            assert sure[kept].min() > sure[wanted & ~kept].max()


def test_output_is_combine_times_experts_of_dispatch() -> None:
    # The study's view: a dispatch tensor [T, E, C] of places and a combine tensor of their weights.
    router, experts = Vmoe(SHAPE, capacity_factor=0.7), Experts(SHAPE)
    x = tokens()
    output, routing = MoELayer(router, experts)(RouterInput.of(x, causal=False))
    capacity = math.ceil(0.7 * 2 * 30 / 4)
    dispatch, combine = torch.zeros(30, 4, capacity), torch.zeros(30, 4, capacity)
    place = (routing.token_ids, routing.expert_ids, routing.rank)
    dispatch[place], combine[place] = 1.0, routing.weights.detach()
    buffers = torch.einsum("td,tec->ecd", x, dispatch)
    owner = torch.arange(4).repeat_interleave(capacity)
    made = experts.matrices.run(buffers.flatten(0, 1), torch.arange(4 * capacity), owner)
    expected = torch.einsum("tec,ecd->td", combine, made.view(4, capacity, 16))
    torch.testing.assert_close(output, expected)


def test_a_decoder_at_inference_drops_nothing() -> None:
    router = Vmoe(SHAPE, top_k=2, capacity_factor=0.1)
    assert router(RouterInput.of(tokens())).load.sum() == 60
    assert router(RouterInput.of(tokens(), training=True)).load.sum() < 60


def test_noise_is_small_and_of_the_generator() -> None:
    router = Vmoe(SHAPE, noise=2.0)
    fields = {"training": True, "generator": torch.Generator().manual_seed(1)}
    noise = router(RouterInput.of(tokens(4000), **fields)).logits - tokens(4000) @ router.weight.T
    assert noise.std().item() == pytest.approx(2.0 / 4, rel=0.05)
    assert set(router(RouterInput.of(tokens(), training=True)).losses) == {"importance"}


def test_load_loss_expects_the_tokens_of_new_noise() -> None:
    router = Vmoe(SHAPE, top_k=1, coefficient=1.0)
    x = tokens()
    routing = router(RouterInput.of(x, training=True, generator=torch.Generator().manual_seed(2)))
    clean = (x @ router.weight.T).tolist()
    bars = routing.logits.max(-1).values.tolist()
    loads = [
        sum(0.5 * math.erfc((bar - row[e]) * 4 / math.sqrt(2)) for row, bar in zip(clean, bars, strict=True))
        for e in range(4)
    ]
    mean = sum(loads) / 4
    expected = sum((load - mean) ** 2 for load in loads) / 4 / mean**2
    assert routing.losses["load"].item() == pytest.approx(expected, rel=1e-3)
