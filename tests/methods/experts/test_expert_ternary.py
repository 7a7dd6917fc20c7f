"""What the experts ternary promise beyond their kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.experts.ternary import Ternary, rounded, rows_rounded
from mixtura.modeling.layer import ExpertMatrices, Experts
from mixtura.types import LayerShape

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=4)


def test_each_matrix_has_three_values() -> None:
    found = Ternary(SHAPE).matrices()
    for matrix in (*found.gate_up[:, :6], *found.gate_up[:, 6:], *found.down):
        values = matrix.unique()
        assert len(values) == 3
        torch.testing.assert_close(values[0], -values[2])
        assert values[1] == 0


def test_the_gradient_is_that_at_the_rounded_weights() -> None:
    bank = Ternary(SHAPE, quantize_inputs=False)
    x, ids = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    Experts(bank).matrices.run(x, torch.arange(3), ids).square().sum().backward()
    found = bank.matrices()
    gate_up, down = (one.detach().requires_grad_() for one in (found.gate_up, found.down))
    ExpertMatrices(gate_up, down).run(x, torch.arange(3), ids).square().sum().backward()
    torch.testing.assert_close(bank.gate_up_proj.grad, gate_up.grad)
    torch.testing.assert_close(bank.down_proj.grad, down.grad)


def test_rows_are_rounded_to_8_bits_of_their_largest_value() -> None:
    x = torch.tensor([[1.27, 0.004, -0.016], [0.0, 0.0, 0.0]], requires_grad=True)
    made = rows_rounded(x)
    torch.testing.assert_close(made.detach(), torch.tensor([[1.27, 0.0, -0.02], [0.0, 0.0, 0.0]]))
    made.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3))


def test_what_is_packed_unpacks_to_what_is_computed_with() -> None:
    bank = Ternary(SHAPE)
    codes, scales = bank.packed()["down"]
    assert codes.dtype == torch.uint8
    assert codes.numel() == 4 * 8 * 6 // 4
    levels = (codes[:, :, None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)) & 3
    unpacked = (levels.flatten(1).float() - 1).view(4, 8, 6) * scales[:, None, None]
    torch.testing.assert_close(unpacked, bank.matrices().down.detach())


def test_zeros_stay_zeros() -> None:
    assert torch.equal(rounded(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))
