"""What the experts unequal promise beyond their kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods.experts.unequal import Unequal
from mixtura.modeling.layer import Experts
from mixtura.types import LayerShape

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=5)


def test_padding_changes_nothing() -> None:
    bank = Unequal(SHAPE, widths=[6, 2])
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    for expert, width, place in ((0, 6, 0), (1, 2, 0), (2, 6, 1), (3, 2, 1), (4, 6, 2)):
        made = Experts(bank).matrices.run(x, torch.tensor([0]), torch.tensor([expert]))
        gate, up = (x @ bank.get_parameter(f"gate_up_{width}")[place].T).chunk(2, dim=-1)
        expected = (F.silu(gate) * up) @ bank.get_parameter(f"down_{width}")[place].T
        torch.testing.assert_close(made, expected)


def test_parameters_are_as_many_as_the_formula_says() -> None:
    assert sum(one.numel() for one in Unequal(SHAPE, widths=[6, 2]).parameters()) == 3 * 8 * (3 * 6 + 2 * 2)
    assert Unequal(SHAPE).by_expert == [6, 1, 6, 1, 6]


@pytest.mark.parametrize("widths", [[7, 6], [0, 6], [3, 2]])
def test_widths_that_do_not_fit_are_refused(widths: list[int]) -> None:
    with pytest.raises(SettingError, match=r"widths of Unequal must be in \[1, 6\], one of them 6"):
        Unequal(SHAPE, widths=widths)
