"""What the adapter mos promises beyond its kind's contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods.adapters.adapter_inputs import stirred

from mixtura.adapting.changing import low_rank_delta
from mixtura.errors import SettingError
from mixtura.types import MatrixShape, RouterInput, Site

NOTHING = RouterInput.of(torch.empty(0, 16))


def mos_layers(count: int = 5, **settings: Any) -> list[Any]:
    """The layers of one role."""
    names = tuple(f"layers.{n}.q_proj" for n in range(count))
    shapes = {"weight": MatrixShape(20, 16)}
    sites = [
        Site(name=name, kind="linear", layer=n, num_layers=count, matrices=shapes, peers=names)
        for n, name in enumerate(names)
    ]
    made = [stirred("mos", site, **settings) for site in sites]
    for one in made:
        one.join(made[0])
    return made


def test_rows_are_shards_of_pools_laid_end_to_end() -> None:
    made = mos_layers(rank=4, budget=2, shards=2, private=1, alpha=6.0)
    first = made[0]
    assert sum(p.numel() for one in made for p in one.parameters()) == 5 * 2 * (16 + 20)
    for one in made:
        a, b = torch.zeros(4, 16, dtype=torch.float64), torch.zeros(20, 4, dtype=torch.float64)
        for row in range(4):
            for half in range(2):
                a[row, 8 * half : 8 * half + 8] = first.pool_a[one.ids_a[2 * row + half]]
                b[10 * half : 10 * half + 10, row] = first.pool_b[one.ids_b[2 * row + half]]
        part = one.change(NOTHING).matrices["weight"]
        torch.testing.assert_close(low_rank_delta(part, torch.float64)[0], 1.5 * b @ a)
    private = [set(one.ids_a[:2].tolist()) for one in made]
    assert all(torch.equal(one.ids_a[:2], one.ids_b[:2]) for one in made)
    assert len(set.union(*private)) == 10
    assert not any(
        private[n] & set(other.ids_a.tolist()) for n in range(5) for other in made if other is not made[n]
    )
    assert any(not torch.equal(one.ids_a[2:], one.ids_b[2:]) for one in made)
    assert all(len(set(one.ids_a.tolist())) == 8 for one in made)


def test_shards_that_do_not_divide_a_side_are_refused() -> None:
    with pytest.raises(SettingError, match="shards of Mos must divide"):
        mos_layers(shards=3)
