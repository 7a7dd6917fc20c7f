"""What the form stacked promises beyond its kind's contract."""

from __future__ import annotations

import torch
from modeling.tiny_models import tiny_model
from torch.nn import functional as F

from mixtura.methods.forms.stacked import Stacked
from mixtura.types import LayerShape

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=4)


def test_equals_blocks_one_after_the_other() -> None:
    form = Stacked(SHAPE, depth=3)
    x, residual = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    passes = [lambda read, route=None, by=by: by * read for by in (2.0, 3.0, 4.0)]
    h = residual + 2 * x
    h = h + 3 * F.rms_norm(h, (8,), form.norms[0].weight, 1e-6)
    h = h + 4 * F.rms_norm(h, (8,), form.norms[1].weight, 1e-6)
    torch.testing.assert_close(residual + form(x, residual, passes), h)


def test_a_dense_part_cut_up_has_its_parameters_and_those_of_routing() -> None:
    dense = tiny_model(layers=["dense", "dense"], intermediate_size=48)
    moe = {
        "num_experts": 4, "d_expert": 6, "form": {"name": "stacked", "depth": 2}, "router": None,
        "mixer": "output_sigmoid",
    }  # fmt: skip
    cut = tiny_model(moe)
    sizes = [sum(one.numel() for one in model.parameters()) for model in (dense, cut)]
    # In each of two layers: a row of 32 for each of 2 * 4 experts, and one more norm.
    assert sizes[1] - sizes[0] == 2 * (2 * 4 * 32 + 32)
