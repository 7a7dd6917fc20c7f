"""What the adapter lora_mixer promises beyond its kind's contract."""

from __future__ import annotations

import torch
from methods.adapters.adapter_sites import linear_site

from mixtura.methods.adapters.lora_mixer import LoraMixer
from mixtura.types import RouterInput

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))


def test_all_experts_are_trained_and_the_best_are_used() -> None:
    made = LoraMixer(linear_site(), rank=2, num_experts=4, top_k=2)
    trained = made.change(RouterInput.of(X, training=True)).shares
    used = made.change(RouterInput.of(X)).shares
    torch.testing.assert_close(trained, (X @ made.gate.T).softmax(-1))
    assert (used > 0).sum(-1).tolist() == [2] * 6
    torch.testing.assert_close(used.sum(-1), torch.ones(6))


def test_with_all_experts_in_use_nothing_differs_after_training() -> None:
    made = LoraMixer(linear_site(), rank=2, num_experts=4, top_k=4)
    trained, used = (made.change(RouterInput.of(X, training=on)).shares for on in (True, False))
    torch.testing.assert_close(trained, used)


def test_a_sure_router_has_the_lower_entropy_loss() -> None:
    made = LoraMixer(linear_site(), rank=2, sharpness=1.0)
    losses = []
    for factor in (0.0, 1.0, 50.0):
        with torch.no_grad():
            made.gate.mul_(0).add_(factor * torch.eye(4, 16))
        losses.append(float(made.change(RouterInput.of(X, training=True)).losses["entropy"]))
    assert losses[0] > losses[1] > losses[2]
    assert abs(losses[0] - torch.tensor(4.0).log().item()) < 1e-5
