"""What the experts product promise beyond their kind's contract."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mixtura.errors import SettingError, UserError
from mixtura.methods.experts.feature_modulated import FeatureModulated
from mixtura.methods.experts.product import Product
from mixtura.methods.routers.monet import Monet
from mixtura.modeling.layer import ExpertPool, Experts, MoELayer
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=6, d_expert=4, num_experts=16)


def explicit(bank: Product, x: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """What expert (row, column) makes of one token, as the paper writes it."""

    def half(weight: torch.Tensor, bias: torch.Tensor, place: int) -> torch.Tensor:
        return F.relu(weight[place] @ x + bias[place]).square()

    hidden = half(bank.read_rows, bank.read_rows_bias, row)
    if bank.variant == "horizontal":
        return bank.write_columns[column] @ hidden + bank.write_columns_bias[column]
    other = half(bank.read_columns, bank.read_columns_bias, column)
    size = hidden.shape[0]
    v11, v12 = bank.write_rows[row][:, :size], bank.write_rows[row][:, size:]
    v21, v22 = bank.write_columns[column][:, :size], bank.write_columns[column][:, size:]
    first = v11 @ hidden + v12 @ other + bank.write_rows_bias[row]
    return torch.cat([first, v21 @ hidden + v22 @ other + bank.write_columns_bias[column]])


@pytest.mark.parametrize("variant", ["horizontal", "vertical"])
def test_equals_all_sixteen_explicit_experts(variant: str) -> None:
    bank = Product(SHAPE, variant=variant)  # type: ignore[arg-type]
    with torch.no_grad():
        for number, parameter in enumerate(bank.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(number))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(50))
    router = Monet(SHAPE, num_heads=2, per_head=2)
    output, routing = MoELayer(router, Experts(bank))(RouterInput.of(x))
    rows, columns = routing.gates
    expected = torch.zeros_like(x)
    for token in range(3):
        for row in range(4):
            for column in range(4):
                weight = (rows[token, :, row] * columns[token, :, column]).sum()
                expected[token] += weight * explicit(bank, x[token], row, column)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("variant", ["horizontal", "vertical"])
def test_parameters_grow_with_rows_and_not_with_experts(variant: str) -> None:
    def count(num_experts: int) -> int:
        shape = LayerShape(d_model=6, d_expert=4, num_experts=num_experts)
        return sum(one.numel() for one in Product(shape, variant=variant).parameters())  # type: ignore[arg-type]

    assert count(10_000) == 10 * count(100)
    sides = {"horizontal": 4 * 6 + 4 + 6 * 4 + 6, "vertical": 2 * (2 * 6 + 2 + 3 * 4 + 3)}
    assert count(100) == 10 * sides[variant]


def test_a_quarter_of_a_million_experts_without_a_score_for_each() -> None:
    shape = LayerShape(d_model=6, d_expert=4, num_experts=262_144)
    layer = MoELayer(Monet(shape, num_heads=2), Experts(Product(shape)))
    output, routing = layer(RouterInput.of(torch.ones(2, 6)))
    assert routing.num_experts == 262_144
    assert routing.scores.shape == (2, 1024)
    assert output.isfinite().all()


def test_gates_of_many_experts_are_refused_by_experts_that_run_one_by_one() -> None:
    shape = LayerShape(d_model=6, d_expert=1, num_experts=10_000)
    with torch.device("meta"):
        bank = FeatureModulated(shape)
    layer = MoELayer(Monet(shape), Experts(bank))
    with pytest.raises(UserError, match="choose experts with the tag gates"):
        layer(RouterInput.of(torch.ones(1, 6)))


def test_a_pool_of_plain_experts_takes_gates_too() -> None:
    pool = ExpertPool([Experts(LayerShape(6, 4, 8), seed=0), Experts(LayerShape(6, 4, 8), seed=1)])
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    output, routing = MoELayer(Monet(pool.shape, num_heads=2), pool)(RouterInput.of(x))
    rows, columns = routing.gates
    weights = torch.einsum("thr,thc->trc", rows, columns).flatten(1)
    made = pool.matrices.run(x, torch.arange(3).repeat_interleave(16), torch.arange(16).repeat(3))
    torch.testing.assert_close(output, torch.einsum("te,ted->td", weights, made.view(3, 16, 6)))


def test_widths_that_do_not_halve_are_refused() -> None:
    with pytest.raises(SettingError, match="d_expert must be even"):
        Product(LayerShape(d_model=6, d_expert=3, num_experts=16))
    with pytest.raises(SettingError, match="d_model must be even"):
        Product(LayerShape(d_model=5, d_expert=4, num_experts=16))
