"""What the router rex_moe promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import SettingError
from mixtura.methods.routers.rex_moe import RexMoe
from mixtura.modeling.layer import ExpertPool, Experts, MoELayer
from mixtura.types import LayerShape, RouterInput, Routing

# A pool of three layers of four experts.
SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=12)


def tokens(count: int = 200) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(0))


def routed(router: RexMoe, step: int, seed: int | None = None) -> Routing:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return router(RouterInput.of(tokens(), step=step, training=True, generator=generator))


@pytest.mark.parametrize(
    ("step", "count"),
    [(0, 4), (100, 4), (124, 4), (125, 5), (149, 5), (150, 6), (200, 8), (299, 11), (300, 12), (900, 12)],
)
def test_candidates_grow_linearly_from_one_layers_experts_to_all(step: int, count: int) -> None:
    router = RexMoe(SHAPE, reuse=3, start_step=100, end_step=300)
    assert router.num_candidates(step) == count
    assert (routed(router, step, 1).load > 0).sum() == count


def test_own_experts_always_stay_and_others_come_and_go() -> None:
    router = RexMoe(SHAPE, reuse=3, start_step=100, end_step=300)
    seen = torch.stack([routed(router, 200, seed).load > 0 for seed in range(20)])
    assert seen[:, :4].all()
    assert seen.sum(1).tolist() == [8] * 20
    assert seen[:, 4:].any(0).all()
    assert not seen[:, 4:].all(0).any()


def test_any_expert_may_be_kept_out() -> None:
    router = RexMoe(SHAPE, reuse=3, start_step=100, end_step=300, keep_out="any")
    seen = torch.stack([routed(router, 0, seed).load > 0 for seed in range(40)])
    assert seen.sum(1).tolist() == [4] * 40
    assert not seen.all(0).any()
    assert seen.any(0).all()


def test_weights_are_top_k_among_the_candidates() -> None:
    router = RexMoe(SHAPE, reuse=3, top_k=2)
    routing = routed(router, 0)
    scores = (tokens() @ router.weight[:4].T).softmax(-1)
    for token in range(20):
        mine = routing.token_ids == token
        best = scores[token].topk(2)
        expected = torch.zeros(4).scatter(0, best.indices, best.values / best.values.sum())
        torch.testing.assert_close(routing.weights[mine], expected[routing.expert_ids[mine]])


def test_all_are_candidates_outside_training_and_with_one_layer() -> None:
    router = RexMoe(SHAPE, reuse=3)
    quiet = router(RouterInput.of(tokens(), generator=torch.Generator().manual_seed(0)))
    assert (quiet.load > 0).all()
    assert RexMoe(SHAPE, reuse=1).num_candidates(0) == 12


def test_a_layer_runs_its_neighbours_experts() -> None:
    members = [Experts(LayerShape(16, 8, 4), seed=seed) for seed in range(3)]
    layer = MoELayer(RexMoe(SHAPE, reuse=3, top_k=1), ExpertPool(members))
    output, routing = layer(RouterInput.of(tokens(20)))
    token = int((routing.expert_ids >= 8).nonzero()[0])
    row, expert = int(routing.token_ids[token]), int(routing.expert_ids[token])
    alone = members[2].matrices.run(tokens(20), torch.tensor([row]), torch.tensor([expert - 8]))
    torch.testing.assert_close(output[row], alone[0])


def test_bad_settings() -> None:
    with pytest.raises(SettingError, match="reuse of RexMoe must divide the pool's 12, got 5"):
        RexMoe(SHAPE, reuse=5)
    with pytest.raises(SettingError, match="end_step"):
        RexMoe(SHAPE, start_step=10, end_step=10)
