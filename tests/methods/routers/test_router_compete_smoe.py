"""What the router compete_smoe promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mixtura.errors import UserError
from mixtura.methods.routers.compete_smoe import CompeteSmoe
from mixtura.modeling.layer import Experts
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=8, num_experts=4)
EXPERTS = Experts(SHAPE).matrices


def tokens() -> torch.Tensor:
    return torch.randn(20, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def outputs() -> torch.Tensor:
    """Every expert's output of every token, one after another."""
    assert EXPERTS.gate is not None
    made = [
        EXPERTS.down[e] @ (F.silu(EXPERTS.gate[e] @ token) * (EXPERTS.up[e] @ token))
        for token in tokens()
        for e in range(4)
    ]
    return torch.stack(made).view(20, 4, 8)


def test_winners_are_those_of_highest_mean_softplus() -> None:
    router = CompeteSmoe(SHAPE, rate=1.0)
    routing = router(RouterInput.of(tokens(), training=True, experts=EXPERTS))
    affinities = F.softplus(outputs()).mean(-1)
    top = affinities.topk(2)
    expected = torch.zeros(20, 4).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))
    found = torch.zeros(20, 4)
    found[routing.token_ids, routing.expert_ids] = routing.weights
    torch.testing.assert_close(found, expected)
    assert (affinities.argmax(-1) != (tokens() @ router.weight.T).argmax(-1)).any()


@pytest.mark.parametrize("winners", [0.0, 0.5])
def test_losses_of_a_competition_by_hand(winners: float) -> None:
    router = CompeteSmoe(
        SHAPE, top_k=3, rate=1.0, router_coefficient=2.0, winners=winners, diversity_coefficient=5.0
    )
    valid = torch.arange(20) < 15
    routing = router(RouterInput(x=tokens(), valid=valid, training=True, experts=EXPERTS))
    affinities = F.softplus(outputs()[:15]).mean(-1)
    foretold, wins = (tokens()[:15] @ router.weight.T).softmax(-1), affinities.softmax(-1)
    missed = (foretold - wins) ** 2
    top = affinities.topk(3).indices
    expected = missed.mean() + winners * missed.gather(-1, top).mean()
    torch.testing.assert_close(routing.losses["router"], 2 * expected)
    alike = 0.0
    for token in range(15):
        for first in top[token]:
            for second in top[token]:
                if first != second:
                    pair = outputs()[token, first], outputs()[token, second]
                    alike += F.cosine_similarity(*pair, dim=0).item()
    assert abs(routing.losses["diversity"].item() - 5 * alike / (15 * 9)) < 1e-5


def test_the_router_is_taught_and_the_affinities_are_not() -> None:
    experts = Experts(SHAPE)
    router = CompeteSmoe(SHAPE, rate=1.0, diversity_coefficient=0.0)
    given = RouterInput.of(tokens(), training=True, experts=experts.matrices)
    router(given).losses["router"].backward()
    assert router.weight.grad is not None
    assert experts.down_proj.grad is None
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = router(given).losses["router"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_other_steps_and_inference_are_plain_top_k() -> None:
    router = CompeteSmoe(SHAPE, rate=1.0, warm_up=10)
    top = (tokens() @ router.weight.T).softmax(-1).topk(2)
    expected = torch.zeros(20, 4).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))
    for given in ({"training": True, "step": 9}, {"training": False, "step": 10}):
        routing = router(RouterInput.of(tokens(), **given))
        found = torch.zeros(20, 4)
        found[routing.token_ids, routing.expert_ids] = routing.weights
        torch.testing.assert_close(found, expected)
        assert not routing.losses
    with pytest.raises(UserError, match="experts"):
        router(RouterInput.of(tokens(), training=True, step=10))


def test_layers_draw_apart_and_no_more_than_allowed_compete() -> None:
    free, limited = CompeteSmoe(SHAPE, rate=0.3), CompeteSmoe(SHAPE, rate=0.3, max_layers=2)
    table = torch.tensor([[free.competes(layer, step) for layer in range(6)] for step in range(500)])
    assert ((table.float().mean(0) - 0.3).abs() < 0.08).all()
    assert table.sum(-1).unique().numel() > 3
    kept = torch.tensor([[limited.competes(layer, step) for layer in range(6)] for step in range(500)])
    assert kept.sum(-1).max() == 2
    assert torch.equal(kept, table & (table.cumsum(-1) <= 2))


def test_at_most_so_many_layers_compete_whatever_their_own_seeds() -> None:
    layers = [CompeteSmoe(SHAPE, rate=0.3, max_layers=1, seed=seed) for seed in (5, 77, 1234, 9, 31, 6)]
    counts = [sum(router.competes(layer, step) for layer, router in enumerate(layers)) for step in range(300)]
    assert max(counts) == 1
    assert 0.8 < sum(counts) / 300 < 0.95
    other = CompeteSmoe(SHAPE, rate=0.3, schedule_seed=1)
    assert [other.competes(0, step) for step in range(50)] != [layers[0].competes(0, s) for s in range(50)]
