"""What the experts latent promise beyond their kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import SettingError
from mixtura.methods.experts.ffn import Ffn
from mixtura.methods.experts.latent import Latent
from mixtura.modeling.layer import Experts
from mixtura.types import LayerShape

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=4)


def test_a_latent_space_of_full_rank_holds_any_experts() -> None:
    source, bank = Ffn(SHAPE), Latent(SHAPE, width=8, num_groups=1)
    with torch.no_grad():
        bank.latent_proj.copy_(torch.eye(8).repeat(2, 1)[None])
        bank.gate_up_latent.copy_(source.gate_up_proj)
        bank.down_proj.copy_(source.down_proj)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 3, 1, 2, 0])
    made, expected = (Experts(one).matrices.run(x, torch.arange(5), ids) for one in (bank, source))
    torch.testing.assert_close(made, expected)


def test_gates_have_the_rank_of_the_latent_space() -> None:
    gate_up = Latent(SHAPE, width=2, num_groups=2).matrices().gate_up
    stacked = gate_up[:2, :6].flatten(0, 1)
    assert torch.linalg.matrix_rank(stacked.detach()) == 2


@pytest.mark.parametrize(("width", "groups"), [(2, 1), (3, 4)])
def test_parameters_are_as_many_as_the_formula_says(width: int, groups: int) -> None:
    bank = Latent(SHAPE, width=width, num_groups=groups)
    expected = 2 * groups * width * 8 + 2 * 4 * 6 * width + 4 * 6 * 8
    assert sum(one.numel() for one in bank.parameters()) == expected


def test_begins_with_the_deviation_of_the_model() -> None:
    bank = Latent(LayerShape(d_model=64, d_expert=64, num_experts=8), width=16)
    bank.rescale(0.02)
    assert bank.matrices().gate_up.std().item() == pytest.approx(0.02, rel=0.1)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(SettingError, match="must divide the 4 experts, got 3"):
        Latent(SHAPE, num_groups=3)
