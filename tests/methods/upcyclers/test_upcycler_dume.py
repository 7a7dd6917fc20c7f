"""What the upcycler dume promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixtura.authoring.contracts import sample_dense_trace
from mixtura.errors import UserError
from mixtura.methods.upcyclers.dume import Dume
from mixtura.types.upcycling import Carry, DenseShape, LayerInputs, UpcycleShape

DENSE = DenseShape(d_model=6, d_ffn=8, num_layers=1)
SHAPE = UpcycleShape(num_experts=2, top_k=1)


def test_rows_are_ridge_regression_on_the_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, generator=generator, dtype=torch.float64)
    of = torch.arange(80) % 2
    x[of == 1, 2] += 3
    with_ones = torch.cat([x, torch.ones(80, 1).double()], 1)
    y = torch.nn.functional.one_hot(of, 2).double()
    layer = LayerInputs(
        means=torch.zeros(2, 6), lasts=torch.zeros(2, 6), counts=torch.tensor([40, 40]),
        products=with_ones.T @ with_ones, targets=with_ones.T @ y,
    )  # fmt: skip
    trace = replace(sample_dense_trace(DENSE, num_groups=2), layers=(layer,))
    recipe = Dume(ridge=0.5, temperature=0.2).recipe((DENSE,) * 2, SHAPE, trace)
    # Ridge regression is least squares on data with root lambda times the identity below.
    below = torch.cat([x, 0.5**0.5 * torch.eye(6).double()])
    wanted = torch.linalg.lstsq(below, torch.cat([y, torch.zeros(6, 2).double()])).solution.T
    wanted = wanted / wanted.norm(dim=1, keepdim=True) / 0.2
    (rows,) = recipe.arrays.values()
    torch.testing.assert_close(rows.double(), wanted, atol=1e-5, rtol=1e-5)
    assert recipe.actions[0] == Carry((0, 1), (0.5, 0.5))


def test_every_source_needs_text() -> None:
    with pytest.raises(UserError, match="each of 2 sources needs text"):
        Dume().recipe((DENSE,) * 2, SHAPE, sample_dense_trace(DENSE, num_groups=1))
