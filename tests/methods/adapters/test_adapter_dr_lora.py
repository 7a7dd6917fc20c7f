"""What the adapter dr_lora promises beyond its kind's contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods.adapters.adapter_inputs import stirred
from methods.adapters.adapter_sites import experts_site

from mixtura.adapting.changing import low_rank_delta
from mixtura.methods import load_method
from mixtura.types import Progress, RouterInput, Site

NOTHING = RouterInput.of(torch.empty(0, 16))


def dr_loras(**settings: Any) -> list[Any]:
    """Two layers of four experts."""
    names = tuple(experts_site(n).name for n in range(2))
    shapes = dict(experts_site().matrices)
    sites = [
        Site(name=n, kind="experts", layer=i, num_layers=2, matrices=shapes, num_experts=4, peers=names)
        for i, n in enumerate(names)
    ]
    settings = {"rank": 4, "alpha": 8.0, "interval": 2, "decay": 0.0, "growing": 0.5} | settings
    made = [stirred("dr_lora", site, **settings) for site in sites]
    for one in made:
        one.join(made[0])
    return made


def test_ranks_grow_where_experts_are_salient_until_the_budget_is_spent() -> None:
    made = dr_loras()
    assert [one.ranks.tolist() for one in made] == [[2] * 4] * 2
    loads = [torch.tensor([8.0, 4, 0, 1]), torch.tensor([2.0, 0, 0, 6])]
    seen = []
    for step in range(16):
        for one, load in zip(made, loads, strict=True):
            one.zero_grad()
            for parameter in one.parameters():
                parameter.grad = torch.ones_like(parameter)
            one.before_step(Progress(step=step, num_steps=16, loads=load, num_tokens=12))
        seen.append(sum(int(one.ranks.sum()) for one in made))
    # 16 ranks are left to give, in four growths, two steps apart.
    assert seen == [16, 20, 20, 24, 24, 28, 28, *[32] * 9]
    assert made[0].ranks[0] >= made[0].ranks[1] >= made[0].ranks[2]
    assert made[1].ranks[3] > made[1].ranks[1]


@pytest.mark.parametrize(
    ("num_steps", "interval", "growing", "wanted"),
    [
        (6, 100, 0.5, [16, 16, *[32] * 4]),
        (1, 100, 0.5, [32]),
        (3, 3, 0.5, [32, 32, 32]),
        (5, 2, 1.0, [16, 24, 24, 32, 32]),
        (6, 100, 0.0, [16] * 6),
    ],
)
def test_ranks_grow_in_a_stage_that_is_shorter_than_the_interval(
    num_steps: int, interval: int, growing: float, wanted: list[int]
) -> None:
    """At the end of the steps in which they may, so that the mean is the rank that was asked for."""
    made = dr_loras(interval=interval, growing=growing)
    seen = []
    for step in range(num_steps):
        for one in made:
            one.before_step(Progress(step=step, num_steps=num_steps, loads=torch.ones(4), num_tokens=4))
        seen.append(sum(int(one.ranks.sum()) for one in made))
    assert seen == wanted


def test_importance_is_the_mean_of_parameter_times_gradient_over_the_ranks_there_are() -> None:
    one = dr_loras()[0]
    total, count = 0.0, 0
    for name in ("up", "down"):
        a, b = one.get_parameter(f"{name}_a"), one.get_parameter(f"{name}_b")
        part = one.change(NOTHING).matrices[name]
        (low_rank_delta(part, torch.float64).pow(3)).sum().backward()
        total += float((a[1, :2] * a.grad[1, :2]).abs().sum() + (b[1, :, :2] * b.grad[1, :, :2]).abs().sum())
        count += 2 * (a.shape[2] + b.shape[1])
        assert not a.grad[:, 2:].any()
    one.before_step(Progress(step=0, num_steps=16, loads=torch.ones(4), num_tokens=4))
    assert float(one.importance[1]) == pytest.approx(total / count, rel=1e-9)


def test_growing_changes_nothing_of_what_is_learned() -> None:
    made = load_method("adapters", "dr_lora")(experts_site(), rank=4)
    with torch.no_grad():
        made.up_b[:, :, :2].normal_()
    before = low_rank_delta(made.change(NOTHING).matrices["up"], torch.float64)
    made.join(made)
    made.grow(1)
    assert made.ranks.tolist() == [4] * 4
    assert torch.equal(low_rank_delta(made.change(NOTHING).matrices["up"], torch.float64), before)
