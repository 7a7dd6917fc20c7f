"""Probabilities, entropy and means that methods of several kinds compute."""

from __future__ import annotations

import pytest
import torch

from mixtura.methods._scores import entropy, mean_of_valid, to_sum_one


def test_entropy_of_a_sure_and_an_unsure_token() -> None:
    found = entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0]).where(found == 0, torch.tensor(2.0).log()))


def test_entropy_has_finite_gradients_where_a_probability_is_nothing() -> None:
    logits = torch.tensor([[0.0, -104.0], [0.0, -2.0]], requires_grad=True)
    entropy(logits.softmax(-1)).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0], torch.zeros(2))
    exact = torch.tensor([0.0, -2.0], dtype=torch.float64, requires_grad=True)
    (-(exact.softmax(0) * exact.log_softmax(0)).sum()).backward()
    torch.testing.assert_close(logits.grad[1].double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_weights_over_their_sum_with_zeros() -> None:
    found = to_sum_one(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    assert found.tolist() == [[0.25, 0.75], [0.0, 0.0]]


@pytest.mark.parametrize("total", [1e-45, 1e-42, 1e-38, 1e-20])
def test_weights_that_all_but_vanish_have_finite_gradients(total: float) -> None:
    weights = torch.tensor([[0.25 * total, 0.75 * total]], requires_grad=True)
    found = to_sum_one(weights)
    assert ((found >= 0) & (found <= 1)).all()
    (1e6 * found[0, 0]).backward()
    assert weights.grad is not None
    assert torch.isfinite(weights.grad).all()
    if total > 1e-30:
        torch.testing.assert_close(found[0].detach(), torch.tensor([0.25, 0.75]))
        expected = torch.tensor([[0.75, -0.25]]).double() / total * 1e6
        torch.testing.assert_close(weights.grad.double(), expected, rtol=1e-5, atol=0)


def test_the_mean_leaves_padding_out() -> None:
    values, valid = torch.tensor([1.0, 2.0, 90.0]), torch.tensor([True, True, False])
    assert mean_of_valid(values, valid).item() == 1.5
    assert mean_of_valid(values, torch.zeros(3, dtype=torch.bool)).item() == 0
