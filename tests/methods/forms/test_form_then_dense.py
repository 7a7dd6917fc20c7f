"""What the form then_dense promises beyond its kind's contract."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mixtura.methods.forms.then_dense import ThenDense
from mixtura.types import LayerShape

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=4)


def test_equals_two_blocks_one_after_the_other() -> None:
    form = ThenDense(SHAPE, width=5)
    x, residual = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    h = residual + 2 * x
    normed = F.rms_norm(h, (8,), form.norm.weight, 1e-6)
    branch = form.branch
    made = (F.silu(normed @ branch.gate.T) * (normed @ branch.up.T)) @ branch.down.T
    found = form(x, residual, [lambda read, route=None: 2 * read])
    torch.testing.assert_close(residual + found, h + made)
