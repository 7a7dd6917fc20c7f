"""What the experts subspace promise beyond their kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods.experts.subspace import Subspace
from mixtura.modeling.layer import Experts
from mixtura.types import LayerShape

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=4)


def test_equals_slices_of_the_base() -> None:
    bank = Subspace(SHAPE, columns=12)
    strengths = torch.sigmoid(bank.alpha) @ torch.eye(4).repeat_interleave(3, dim=1)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    made = Experts(bank).matrices.run(x, torch.tensor([0, 1]), torch.tensor([2, 3]))
    for row, expert in enumerate((2, 3)):
        columns = bank.chosen()[expert]
        hidden = F.silu(x[row] @ bank.base_up[columns].T)
        expected = strengths[expert, columns].mean() * (hidden @ bank.base_down[columns])
        torch.testing.assert_close(made[row], expected)


def test_every_expert_holds_its_own_block() -> None:
    bank = Subspace(SHAPE, columns=12)
    for expert, columns in enumerate(bank.chosen().tolist()):
        assert set(range(3 * expert, 3 * expert + 3)) <= set(columns)


def test_ties_decide_what_is_borrowed_and_learn() -> None:
    bank = Subspace(SHAPE, columns=12)
    with torch.no_grad():
        bank.alpha[0] = torch.tensor([1.0, -2.0, -2.0, 0.9])
    assert set(bank.chosen()[0].tolist()) == {0, 1, 2, 9, 10, 11}
    x = torch.ones(1, 8)
    Experts(bank).matrices.run(x, torch.tensor([0]), torch.tensor([0])).sum().backward()
    assert (bank.alpha.grad[0] != 0).tolist() == [True, False, False, True]


def test_the_loss_is_that_of_the_authors_code() -> None:
    bank = Subspace(SHAPE, columns=12, coefficient=10.0)
    shares = bank.alpha.sigmoid()
    expected = 10 * (1e-4 * bank.alpha.abs().mean() + 1e-3 * (shares * (1 - shares)).mean())
    torch.testing.assert_close(bank.losses()["topology"], expected)


def test_parameters_are_as_many_as_the_formula_says() -> None:
    assert sum(one.numel() for one in Subspace(SHAPE, columns=12).parameters()) == 2 * 12 * 8 + 16
    # By default F * sqrt(E), here 12, in equal blocks.
    assert Subspace(SHAPE).base_up.shape == (12, 8)


@pytest.mark.parametrize("columns", [10, 4, 28])
def test_bases_that_do_not_fit_are_refused(columns: int) -> None:
    with pytest.raises(SettingError, match="columns of Subspace must be a multiple of the 4 experts"):
        Subspace(SHAPE, columns=columns)
