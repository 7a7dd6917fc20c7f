"""What the router switch_and_mixture promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import SettingError
from mixtura.methods.routers.switch_and_mixture import SwitchAndMixture
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=8, num_experts=12)


def tokens(count: int = 30) -> torch.Tensor:
    return torch.randn(count, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def test_equals_a_plain_loop_over_tokens() -> None:
    router = SwitchAndMixture(SHAPE, num_groups=3, group_top_k=2)
    x = tokens()
    routing = router(RouterInput.of(x))
    for token in range(30):
        groups = (router.group_weight @ x[token]).softmax(-1)
        group = int(groups.argmax())
        local = (router.weight[4 * group : 4 * group + 4] @ x[token]).softmax(-1)
        top = local.topk(2)
        weights = groups[group] * top.values / top.values.sum()
        expected = {4 * group + int(e): w for e, w in zip(top.indices, weights, strict=True)}
        mine = routing.token_ids == token
        assert set(routing.expert_ids[mine].tolist()) == set(expected)
        for expert, weight in zip(routing.expert_ids[mine], routing.weights[mine], strict=True):
            torch.testing.assert_close(weight, expected[int(expert)])


def test_a_better_expert_of_another_group_is_not_taken() -> None:
    router = SwitchAndMixture(SHAPE, num_groups=3, group_top_k=4)
    with torch.no_grad():
        router.group_weight.zero_()[2] = 1.0
        router.weight.zero_()[0] = 100.0
    routing = router(RouterInput.of(torch.ones(1, 8)))
    assert routing.expert_ids.tolist() == [8, 9, 10, 11]


def test_the_loss_is_least_when_groups_are_even() -> None:
    router = SwitchAndMixture(SHAPE, num_groups=2, balance_coefficient=1.0)
    with torch.no_grad():
        router.group_weight.zero_()[0, 0] = 50.0
    away = torch.zeros(4, 8)
    away[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    even = router(RouterInput.of(away)).losses["balance"]
    crowded = router(RouterInput.of(away.abs())).losses["balance"]
    torch.testing.assert_close(torch.stack([even, crowded]), torch.tensor([1.0, 2.0]))


def test_scores_are_probabilities_over_all_experts() -> None:
    routing = SwitchAndMixture(SHAPE, num_groups=4)(RouterInput.of(tokens()))
    torch.testing.assert_close(routing.scores.sum(-1), torch.ones(30))


def test_groups_must_divide_the_experts() -> None:
    with pytest.raises(SettingError, match="must divide the 12 experts"):
        SwitchAndMixture(SHAPE, num_groups=5)
    with pytest.raises(SettingError, match="group_top_k"):
        SwitchAndMixture(SHAPE, num_groups=6, group_top_k=3)
