"""What the analysis congestion promises beyond its kind's contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analysed import trace_of

from mixtura.methods.analyses import Evidence
from mixtura.methods.analyses._congestion import best_gamma, equilibrium, tempered
from mixtura.methods.analyses.congestion import Congestion


def drawn(*shape: int, seed: int = 0, high: int = 8) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def chosen(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(top_k).indices


class TestCongestion:
    QUALITY = np.array([0.0, 0.4, 1.1, -0.6, 0.2, 0.9])

    @pytest.mark.parametrize("gamma", [0.5, 5.0, 40.0])
    def test_the_equilibrium_and_the_planted_coefficient(self, gamma: float) -> None:
        shares = equilibrium(self.QUALITY, gamma)
        made = np.exp(self.QUALITY - gamma * shares)
        assert shares == pytest.approx(made / made.sum(), abs=1e-9)
        assert best_gamma(self.QUALITY, shares)[0] == pytest.approx(gamma, rel=1e-3)

    def test_the_ends(self) -> None:
        assert equilibrium(self.QUALITY, 0.0) == pytest.approx(tempered(self.QUALITY, 1.0))
        assert equilibrium(self.QUALITY, 1e6) == pytest.approx(np.full(6, 1 / 6), abs=1e-4)

    def test_a_planted_load_is_read_from_a_trace(self) -> None:
        """Every token's logits are the qualities; experts are drawn by the shares of a known coefficient."""
        shares = torch.tensor(equilibrium(self.QUALITY, 8.0))
        ids = torch.multinomial(shares.expand(6000, 6), 1, generator=torch.Generator().manual_seed(0))
        logits = torch.tensor(self.QUALITY).expand(6000, 6).float()
        trace = trace_of(ids, num_experts=6, lengths=(100,) * 60, logits=[logits])
        row = Congestion(draws=20).measure(Evidence.of(trace)).rows[0]
        low, gamma, high = row["low"], row["gamma"], row["high"]
        assert low is not None
        assert gamma is not None
        assert high is not None
        assert low <= gamma <= high
        assert gamma == pytest.approx(8.0, rel=0.2)
