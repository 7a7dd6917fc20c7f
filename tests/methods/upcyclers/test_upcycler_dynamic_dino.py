"""What the upcycler dynamic_dino promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.authoring.contracts._upcycled import router_rows
from mixtura.errors import UnmetError
from mixtura.methods.upcyclers.dynamic_dino import DynamicDino
from mixtura.types.upcycling import DenseShape, UpcycleShape

DENSE = DenseShape(d_model=6, d_ffn=24, num_layers=2)


def test_a_whole_group_is_taken() -> None:
    recipe = DynamicDino().recipe((DENSE,), UpcycleShape(num_experts=12, top_k=3), None)
    rows = router_rows(recipe, 1, 6, 12)
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = (x @ rows.T).topk(3).indices // 3
    assert bool((groups == groups[:, :1]).all())
    assert len(groups[:, 0].unique()) == 4
    assert not torch.equal(rows, router_rows(recipe, 0, 6, 12))


def test_numbers_that_make_no_groups_are_refused() -> None:
    with pytest.raises(UnmetError, match="7 is no multiple of that; give --experts 6"):
        DynamicDino().recipe((DENSE,), UpcycleShape(num_experts=7, top_k=3), None)
    with pytest.raises(UnmetError, match="24 wide, which 5 equal parts do not make"):
        DynamicDino().recipe((DENSE,), UpcycleShape(num_experts=10, top_k=5), None)
