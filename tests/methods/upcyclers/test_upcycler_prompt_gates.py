"""What the upcycler prompt_gates promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixtura.authoring.contracts import sample_dense_trace
from mixtura.errors import UserError
from mixtura.methods.upcyclers.prompt_gates import PromptGates
from mixtura.types.upcycling import DenseShape, SetRouter, UpcycleShape

DENSE = DenseShape(d_model=6, d_ffn=8, num_layers=2)
SHAPE = UpcycleShape(num_experts=2, top_k=1)


def test_rows_are_mean_inputs_less_those_it_is_not_for() -> None:
    trace = replace(sample_dense_trace(DENSE, num_groups=3), experts=(0, 1, 0), negative=(False, False, True))
    for pool in ("mean", "last"):
        recipe = PromptGates(pool=pool, length=2.0).recipe((DENSE,) * 2, SHAPE, trace)
        for layer, seen in enumerate(trace.layers):
            values = seen.means if pool == "mean" else seen.lasts
            wanted = torch.stack([values[0] - values[2], values[1]])
            wanted = 2 * wanted / wanted.norm(dim=1, keepdim=True)
            (router,) = (a for a in recipe.actions if isinstance(a, SetRouter) and a.layer == layer)
            torch.testing.assert_close(recipe.arrays[str(router.rows)], wanted)


def test_a_source_without_prompts_is_named() -> None:
    trace = sample_dense_trace(DENSE, num_groups=1)
    with pytest.raises(UserError, match="no prompts for source 1"):
        PromptGates().recipe((DENSE,) * 2, SHAPE, trace)
