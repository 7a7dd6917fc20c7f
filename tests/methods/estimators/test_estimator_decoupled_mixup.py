"""The decoupled terms against loops: no gradient on the other label, nothing of rows with one label."""

from __future__ import annotations

import math

import pytest
import torch

from mixtura.methods.estimators.decoupled_mixup import mixed_loss

LOGITS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FIRST, SECOND = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 1, 0, 2])


def cross_entropy(z: list[float], label: int, without: int | None = None) -> float:
    kept = [v for place, v in enumerate(z) if place != without]
    return math.log(sum(map(math.exp, kept))) - z[label]


def test_the_loss_is_that_of_loops() -> None:
    share, eta, total = 0.3, 0.5, 0.0
    for z, a, b in zip(LOGITS.tolist(), FIRST.tolist(), SECOND.tolist(), strict=True):
        total += share * cross_entropy(z, a) + (1 - share) * cross_entropy(z, b)
        if a != b:
            total += eta * share * cross_entropy(z, a, b) + eta * (1 - share) * cross_entropy(z, b, a)
    assert float(mixed_loss(LOGITS, FIRST, SECOND, share, eta)) == pytest.approx(total / 4)


def test_without_eta_it_is_mixup() -> None:
    plain = 0.3 * torch.nn.functional.cross_entropy(LOGITS, FIRST)
    plain = plain + 0.7 * torch.nn.functional.cross_entropy(LOGITS, SECOND)
    assert torch.equal(mixed_loss(LOGITS, FIRST, SECOND, 0.3, 0.0), plain)


def test_the_rivals_logit_has_no_gradient_of_a_decoupled_term() -> None:
    def slope(eta: float) -> torch.Tensor:
        logits = LOGITS.clone().requires_grad_()
        # All of the first label: the rival is the second.
        mixed_loss(logits, FIRST, SECOND, 1.0, eta).backward()
        return logits.grad

    more = slope(1.0) - slope(0.0)
    rows = torch.arange(4)[FIRST != SECOND]
    assert torch.equal(more[rows, SECOND[rows]], torch.zeros(3, dtype=torch.float64))
    assert bool((more[rows, FIRST[rows]] < 0).all())
    assert torch.equal(more[1], torch.zeros(3, dtype=torch.float64))


def test_one_label_alone_in_a_minibatch() -> None:
    same = torch.zeros(4, dtype=torch.long)
    assert torch.isfinite(mixed_loss(LOGITS, same, same, 0.4, 1.0))
