"""What the adapter s_mora promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch
from methods.adapters.adapter_inputs import X, added, softmax, stirred
from methods.adapters.adapter_sites import linear_site

from mixtura.methods import load_method
from mixtura.types import Progress, RouterInput


@pytest.mark.parametrize("weight", ["one", "softmax"])
def test_a_token_uses_the_ranks_that_are_chosen(weight: str) -> None:
    made = stirred("s_mora", rank=6, top_k=2, alpha=3.0, weight=weight)
    made.bias[4] = 0.4
    wanted = torch.zeros(7, 20, dtype=torch.float64)
    for token, x in enumerate(X):
        scores = softmax((made.gate @ x).tolist())
        order = sorted(range(6), key=lambda e: -(scores[e] + float(made.bias[e])))[:2]
        for rank in order:
            part = 2 * scores[rank] / sum(scores[e] for e in order) if weight == "softmax" else 1.0
            wanted[token] += part * 1.5 * made.b[rank, :, 0] * (made.a[rank, 0] @ x)
    torch.testing.assert_close(added(made.change(RouterInput.of(X))), wanted.detach(), rtol=1e-8, atol=1e-10)


def test_all_ranks_together_are_plain_lora() -> None:
    made = stirred("s_mora", rank=6, top_k=6, alpha=3.0)
    whole = 0.5 * X @ made.a[:, 0].T @ made.b[:, :, 0]
    torch.testing.assert_close(added(made.change(RouterInput.of(X))), whole.detach())


def test_biases_move_against_the_load() -> None:
    made = load_method("adapters", "s_mora")(linear_site(), rank=4, top_k=2, rate=0.5)
    made.before_step(Progress(step=0, num_steps=9, loads=torch.tensor([4.0, 0, 2, 2]), num_tokens=4))
    assert made.bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
