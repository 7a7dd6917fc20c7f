"""What the router pre_gated promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods.routers.pre_gated import PreGated
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(20, SHAPE.d_model, generator=torch.Generator().manual_seed(seed))


def test_the_layer_before_decides() -> None:
    before, here = PreGated(SHAPE, seed=1), PreGated(SHAPE, seed=2)
    handed = before(RouterInput.of(tokens(0))).state
    routing = here(RouterInput.of(tokens(1), layer=1, state=handed))
    expected = (tokens(0) @ before.weight.T).softmax(-1)
    torch.testing.assert_close(routing.scores, expected)
    for token in range(20):
        mine = routing.expert_ids[routing.token_ids == token]
        assert set(mine.tolist()) == set(expected[token].topk(2).indices.tolist())


def test_what_a_layer_sees_changes_only_the_next() -> None:
    router = PreGated(SHAPE)
    state = torch.randn(20, 6, generator=torch.Generator().manual_seed(3))
    one, other = (router(RouterInput.of(tokens(seed), layer=1, state=state)) for seed in (4, 5))
    assert torch.equal(one.expert_ids, other.expert_ids)
    assert not torch.equal(one.state, other.state)


def test_the_first_layer_decides_for_itself() -> None:
    router = PreGated(SHAPE)
    torch.testing.assert_close(router(RouterInput.of(tokens())).logits, tokens() @ router.first.T)


def test_layers_of_different_numbers_of_experts() -> None:
    with pytest.raises(UserError, match="needs a state of 6 logits a token"):
        PreGated(SHAPE)(RouterInput.of(tokens(), state=torch.zeros(20, 5)))
