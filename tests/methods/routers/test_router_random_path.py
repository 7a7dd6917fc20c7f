"""What the router random_path promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import SettingError
from mixtura.methods.routers.random_path import RandomPath
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=4, d_expert=8, num_experts=2)


def inputs(step: int, count: int = 3000) -> RouterInput:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return RouterInput.of(x, step=step, training=True, generator=torch.Generator().manual_seed(1))


def test_paths_are_random_until_the_switch_and_then_learnt() -> None:
    router = RandomPath(SHAPE, switch_step=10)
    early, late = (router(inputs(step)) for step in (9, 10))
    assert all(0.3 < share < 0.37 for share in (early.load / 3000).tolist())
    likely = (inputs(10).x @ router.option_weight.T).argmax(-1)
    assert late.load.tolist() == [int((likely == expert).sum()) for expert in (0, 1)]
    torch.testing.assert_close(late.weights, torch.ones_like(late.weights))


def test_the_budget_is_kept() -> None:
    router = RandomPath(SHAPE, switch_step=0, budget=0.2, costs=[1.0, 0.25])
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        routing = router(inputs(1, 200))
        routing.losses["budget"].backward()
        optimizer.step()
    expected = (routing.scores * torch.tensor([1.0, 0.25])).sum(-1).mean()
    assert expected.item() == pytest.approx(0.2, abs=0.03)


def test_costs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SettingError, match="one number of 0 or more for each of 2 experts"):
        RandomPath(SHAPE, costs=[1.0])
