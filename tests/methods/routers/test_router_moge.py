"""What the router moge promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import SettingError
from mixtura.methods.routers.moge import Moge
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=12)


def tokens() -> torch.Tensor:
    return torch.randn(30, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_every_group_gets_its_best_experts_by_a_plain_loop() -> None:
    router = Moge(SHAPE, top_k=6, num_groups=3)
    routing = router(RouterInput.of(tokens()))
    scores = (tokens() @ router.weight.T).softmax(-1)
    for token in range(30):
        expected = []
        for group in range(3):
            members = range(4 * group, 4 * group + 4)
            expected += sorted(members, key=lambda e: -scores[token, e].item())[:2]
        mine = routing.token_ids == token
        assert routing.expert_ids[mine].tolist() == sorted(expected)
        torch.testing.assert_close(routing.weights[mine], scores[token, sorted(expected)])


def test_device_loads_are_equal_however_skewed_the_router_is() -> None:
    router = Moge(SHAPE, top_k=4, num_groups=4)
    with torch.no_grad():
        router.weight[0] = 50 * tokens().mean(0)
    load = router(RouterInput.of(tokens())).load
    assert load.view(4, 3).sum(-1).tolist() == [30] * 4
    assert load.max() > 15


def test_renormalised_weights_sum_to_one() -> None:
    routing = Moge(SHAPE, top_k=3, num_groups=3, renormalize=True)(RouterInput.of(tokens()))
    sums = torch.zeros(30).index_add(0, routing.token_ids, routing.weights.detach())
    torch.testing.assert_close(sums, torch.ones(30))


@pytest.mark.parametrize(("top_k", "num_groups"), [(4, 5), (3, 2)])
def test_groups_must_divide_experts_and_choices(top_k: int, num_groups: int) -> None:
    with pytest.raises(SettingError, match="num_groups of Moge must divide"):
        Moge(SHAPE, top_k=top_k, num_groups=num_groups)
