"""What the router gshard promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import SettingError
from mixtura.methods.routers.gshard import Gshard
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=6)
PLAIN = LayerShape(d_model=3, d_expert=8, num_experts=3)


def tokens(count: int = 20) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(0))


def plain(capacity_factor: float) -> Gshard:
    """Its logits are the tokens' own values."""
    router = Gshard(PLAIN, capacity_factor=capacity_factor)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    return router


def test_two_experts_weighted_by_their_share_of_the_two_probabilities() -> None:
    router = Gshard(SHAPE, capacity_factor=10.0)
    routing = router(RouterInput.of(tokens()))
    probabilities = (tokens() @ router.weight.T).softmax(-1)
    for token in range(20):
        mine = routing.token_ids == token
        best = probabilities[token].topk(2)
        expected = dict(zip(best.indices.tolist(), (best.values / best.values.sum()).tolist(), strict=True))
        found = dict(zip(routing.expert_ids[mine].tolist(), routing.weights[mine].tolist(), strict=True))
        assert found == pytest.approx(expected)


def test_the_second_is_kept_with_a_chance_of_twice_its_weight() -> None:
    # Weights of the two: 0.8 and 0.2; the second is to be kept in 40 of 100 cases.
    x = torch.tensor([[0.8, 0.2, 1e-9]]).log().expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    routing = plain(10.0)(RouterInput.of(x, training=True, generator=generator))
    assert routing.load[0] == 4000
    assert routing.load[1].item() / 4000 == pytest.approx(0.4, abs=0.03)
    quiet = plain(10.0)(RouterInput.of(x, generator=torch.Generator()))
    assert quiet.load.tolist() == [4000, 4000, 0]


def test_first_choices_of_later_tokens_go_before_second_choices_of_earlier_ones() -> None:
    # Token 0 prefers expert 0, then 1; tokens 1 and 2 prefer 1, then 0. Room for two each.
    x = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    routing = plain(1.0)(RouterInput.of(x, training=True))
    assert list(zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True)) == [
        (0, 0),
        (1, 0),
        (1, 1),
        (2, 1),
    ]
    assert routing.demand is not None
    assert routing.demand.tolist() == [3, 3, 0]


def test_padding_takes_no_room() -> None:
    x = torch.tensor([[2.0, 1.0, 0.0]]).expand(4, -1)
    valid = torch.tensor([False, False, False, True])
    assert plain(1.0)(RouterInput.of(x, valid=valid, training=True)).token_ids.tolist() == [3, 3]


def test_later_tokens_do_not_decide_earlier_ones_choices_at_inference_in_a_decoder() -> None:
    router = Gshard(LayerShape(d_model=4, d_expert=8, num_experts=4))
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    first = [2.0, 1.0, 0.0, 0.0]
    rivals = torch.tensor([[first, [0.0, 2.0, 1.0, 0.0]], [first, [0.0, 0.0, 2.0, 1.0]]])
    modes = {"decoder": {}, "training": {"training": True}, "encoder": {"causal": False}}
    experts = {}
    for name, mode in modes.items():
        routings = [router(RouterInput.of(x, **mode)) for x in rivals]
        experts[name] = [one.expert_ids[one.token_ids == 0].tolist() for one in routings]
    assert experts == {"decoder": [[0, 1], [0, 1]], "training": [[0], [0, 1]], "encoder": [[0], [0, 1]]}


def test_one_expert_is_too_few() -> None:
    with pytest.raises(SettingError, match="number of experts of Gshard"):
        Gshard(LayerShape(d_model=4, d_expert=8, num_experts=1))
