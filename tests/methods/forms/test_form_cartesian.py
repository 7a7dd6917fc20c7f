"""What the form cartesian promises beyond its kind's contract."""

from __future__ import annotations

import torch
from modeling.tiny_models import some_ids, tiny_model
from torch.nn import functional as F

from mixtura.methods.forms.cartesian import Cartesian
from mixtura.types import LayerShape

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=4)


def test_with_nothing_behind_it_the_first_group_is_a_plain_layer() -> None:
    form, x = Cartesian(SHAPE), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    passes = [lambda read, route=None: 2 * read, lambda read, route=None: 0 * read]
    torch.testing.assert_close(form(x, x, passes), 2 * x)


def test_the_second_group_reads_what_the_first_made() -> None:
    form = Cartesian(SHAPE)
    x, residual = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    passes = [lambda read, route=None: 2 * read, lambda read, route=None: 3 * read]
    second = 3 * F.rms_norm(residual + 2 * x, (8,), form.norm.weight, 1e-6)
    torch.testing.assert_close(form(x, residual, passes), 2 * x + second)


def test_groups_share_nothing() -> None:
    model = tiny_model({"form": "cartesian"})
    first, second = model.model.blocks[:2]
    assert first.experts.gate_up_proj is not second.experts.gate_up_proj
    assert not torch.equal(first.experts.gate_up_proj, second.experts.gate_up_proj)
    assert not torch.equal(first.router.weight, second.router.weight)
    routings = model(some_ids(), output_routing=True).routings
    assert len(routings) == 4
