"""What the form modulated promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from modeling.tiny_models import tiny_model
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import UserError
from mixtura.methods.forms.modulated import Modulated
from mixtura.types import LayerShape

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=4)


def test_equals_the_authors_layer() -> None:
    form = Modulated(SHAPE, widening=2)
    with torch.no_grad():
        for number, one in enumerate(form.parameters()):
            one.normal_(generator=torch.Generator().manual_seed(number))
    x, residual = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(90))
    routed: list[Tensor | None] = []

    def experts(z: Tensor, route: Tensor | None = None) -> Tensor:
        routed.append(route)
        return 3 * z

    found = form(x, residual, [experts])
    z = F.gelu(F.linear(x, form.curved, form.curved_bias)) * F.linear(x, form.linear, form.linear_bias)
    made = F.linear(F.gelu(F.linear(3 * z, form.up, form.up_bias)), form.down, form.down_bias)
    torch.testing.assert_close(found, made)
    assert routed[0] is residual


def test_routers_that_run_experts_are_refused() -> None:
    with pytest.raises(UserError, match="Modulated has routers read other tokens than experts"):
        tiny_model({"form": "modulated", "router": "autonomy_of_experts"})
