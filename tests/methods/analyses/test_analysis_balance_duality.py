"""What the analysis balance_duality promises beyond its kind's contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analysed import trace_of
from scipy.optimize import linprog

from mixtura.methods.analyses import Evidence
from mixtura.methods.analyses.balance_duality import BalanceDuality


def drawn(*shape: int, seed: int = 0, high: int = 8) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def chosen(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(top_k).indices


class TestBalanceDuality:
    LOGITS = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor(
        [1.0, 0.0, 0.0, 0.0]
    )

    def trace(self) -> Evidence:
        made = self.LOGITS.topk(2).indices
        return Evidence.of(trace_of(made, num_experts=4, logits=[self.LOGITS]))

    def test_the_dual_bounds_the_even_assignment_and_comes_near(self) -> None:
        """Against the linear program itself."""
        scores = self.LOGITS.double().softmax(-1).numpy()
        tokens, experts = scores.shape
        equal = np.zeros((tokens + experts, tokens * experts))
        for token in range(tokens):
            equal[token, token * experts : (token + 1) * experts] = 1
        for expert in range(experts):
            equal[tokens + expert, expert::experts] = 1
        wanted = np.concatenate([np.full(tokens, 2.0), np.full(experts, tokens * 2 / experts)])
        best = -linprog(-scores.flatten(), A_eq=equal, b_eq=wanted, bounds=(0, 1)).fun / tokens
        found = BalanceDuality(steps=400, rate=0.002).measure(self.trace()).rows[0]
        assert found["dual"] is not None
        assert found["dual_after"] is not None
        assert found["dual"] > found["dual_after"] >= best - 1e-9
        assert found["dual_after"] == pytest.approx(best, abs=0.002)
        assert found["after"] is not None
        assert found["violation"] is not None
        assert found["after"] < found["violation"] / 2

    def test_by_sign_no_token_moves_the_wrong_way(self) -> None:
        made = [
            BalanceDuality(update=update, rate=0.3, steps=200).measure(self.trace()).scalars["wrong"]
            for update in ("sign", "proportional")
        ]
        assert made[0] == 0
        assert made[1] is not None
        assert made[1] > 0
