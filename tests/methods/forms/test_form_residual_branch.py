"""What the form residual_branch promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.forms.residual_branch import ResidualBranch
from mixtura.types import LayerShape

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=4)


def double(x: torch.Tensor, route: torch.Tensor | None = None) -> torch.Tensor:
    assert route is None
    return 2 * x


def test_shares_of_zeros_are_the_mean() -> None:
    form, x = ResidualBranch(SHAPE), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        form.shares.zero_()
    torch.testing.assert_close(form(x, x, [double]), (2 * x + form.branch(x)) / 2)


def test_all_to_the_experts_is_a_plain_layer() -> None:
    form, x = ResidualBranch(SHAPE), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        form.shares.zero_()
        form.shares_bias.copy_(torch.tensor([100.0, -100.0]))
    torch.testing.assert_close(form(x, x, [double]), 2 * x)


def test_the_branch_is_as_wide_as_an_expert_or_as_said() -> None:
    for width, wide in ((0, 6), (10, 10)):
        form = ResidualBranch(SHAPE, width=width)
        assert sum(one.numel() for one in form.parameters()) == 3 * 8 * wide + 2 * 8 + 2
