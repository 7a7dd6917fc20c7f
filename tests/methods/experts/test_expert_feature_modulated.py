"""What the experts feature_modulated promise beyond their kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.experts.feature_modulated import FeatureModulated
from mixtura.types import LayerShape, Rows


def test_one_expert_is_the_closed_form() -> None:
    bank = FeatureModulated(LayerShape(d_model=5, d_expert=1, num_experts=1))
    with torch.no_grad():
        bank.scale_bias.fill_(0.5)
        bank.shift_bias.fill_(-1.0)
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    rows = Rows.of(z, torch.arange(4), torch.zeros(4, dtype=torch.long), 1)
    expected = (z @ bank.scale[0].T + 0.5) * z + z @ bank.shift[0].T - 1.0
    torch.testing.assert_close(bank.run(rows).outputs, expected)


def test_parameters_are_as_many_as_the_formula_says() -> None:
    bank = FeatureModulated(LayerShape(d_model=5, d_expert=9, num_experts=3))
    assert sum(one.numel() for one in bank.parameters()) == 3 * (2 * 25 + 2 * 5)
