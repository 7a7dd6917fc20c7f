"""What the router c_moe promises beyond its kind's contract."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from mixtura.methods.routers.c_moe import CMoe
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)


def tokens() -> torch.Tensor:
    return torch.randn(30, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_scores_are_those_of_a_plain_loop() -> None:
    router = CMoe(SHAPE, top_k=3, start=0.7)
    routing = router(RouterInput.of(tokens()))
    for token, x in enumerate(tokens()):
        activation = torch.stack(
            [(silu(gate @ x) * (up @ x)).abs() for gate, up in zip(router.gate, router.up, strict=True)]
        )
        scores = activation.exp() / activation.exp().sum()
        mine = routing.token_ids == token
        chosen = routing.expert_ids[mine]
        assert set(chosen.tolist()) == set(scores.topk(3).indices.tolist())
        torch.testing.assert_close(routing.weights[mine], 1 + 0.7 * scores[chosen])


def test_at_the_start_every_expert_counts_in_full_and_scale_is_trained() -> None:
    router = CMoe(SHAPE, top_k=2, start=0.0)
    routing = router(RouterInput.of(tokens()))
    assert torch.equal(routing.weights, torch.ones(60))
    routing.weights.sum().backward()
    # Each chosen expert's own scores, summed: what 1 + score * scale is differentiated to.
    wanted = torch.zeros(6).index_add(
        0, routing.expert_ids, routing.scores[routing.token_ids, routing.expert_ids].detach()
    )
    torch.testing.assert_close(router.scale.grad, wanted)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    router = CMoe(SHAPE, top_k=1, start=1.0)
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 5.0])
    routing = router(RouterInput.of(tokens(), selection_bias=bias))
    assert set(routing.expert_ids.tolist()) == {5}
    torch.testing.assert_close(routing.weights, 1 + routing.scores[:, 5])
