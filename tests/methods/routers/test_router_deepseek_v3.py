"""What the router deepseek_v3 promises beyond its kind's contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, Dots1Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.dots1.modeling_dots1 import Dots1TopkRouter

from mixtura.errors import SettingError
from mixtura.methods.routers.deepseek_v3 import DeepseekV3
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=16, d_expert=8, num_experts=12)


def tokens() -> torch.Tensor:
    return torch.randn(50, SHAPE.d_model, generator=torch.Generator().manual_seed(0))


def require_same_as(theirs: torch.nn.Module, ours: DeepseekV3) -> None:
    bias = 0.3 * torch.randn(12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        theirs.e_score_correction_bias.copy_(bias)
    _, weights, chosen = theirs(tokens())
    expected = torch.zeros(50, 12).scatter(1, chosen, weights)
    routing = ours(RouterInput.of(tokens(), selection_bias=bias))
    found = torch.zeros(50, 12)
    found[routing.token_ids, routing.expert_ids] = routing.weights.detach()
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("renormalize", [True, False])
def test_equals_the_router_of_transformers(renormalize: bool) -> None:
    groups: dict[str, Any] = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
    config = DeepseekV3Config(
        hidden_size=16,
        n_routed_experts=12,
        norm_topk_prob=renormalize,
        routed_scaling_factor=2.5,
        **groups,
    )
    ours = DeepseekV3(SHAPE, top_k=3, num_groups=4, top_groups=2, renormalize=renormalize, scaling=2.5)
    require_same_as(DeepseekV3TopkRouter(config), ours)


def test_with_one_group_it_is_the_router_of_dots1() -> None:
    config = Dots1Config(
        hidden_size=16,
        n_routed_experts=12,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
    )
    require_same_as(Dots1TopkRouter(config), DeepseekV3(SHAPE, top_k=4, scaling=1.5))


def test_no_more_groups_than_asked_for() -> None:
    routing = DeepseekV3(SHAPE, top_k=4, num_groups=6, top_groups=2)(RouterInput.of(tokens()))
    for token in range(50):
        groups = set((routing.expert_ids[routing.token_ids == token] // 2).tolist())
        assert len(groups) == 2


def test_settings_that_do_not_fit_together() -> None:
    with pytest.raises(SettingError, match="num_groups of DeepseekV3 must divide 12"):
        DeepseekV3(SHAPE, num_groups=5)
    with pytest.raises(SettingError, match="its 1 groups have 3 experts"):
        DeepseekV3(SHAPE, top_k=4, num_groups=4, top_groups=1)


def test_groups_with_one_allowed_expert_may_be_chosen_for_it() -> None:
    router = DeepseekV3(LayerShape(4, 8, 4), num_groups=2, top_groups=1, top_k=1)
    with torch.no_grad():
        router.weight.copy_(9 * torch.eye(4))
    x = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    for allowed in ([1, 0, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]):
        usable = torch.tensor([allowed], dtype=torch.bool)
        assert router(RouterInput.of(x, allowed=usable)).expert_ids.tolist() == [2]
