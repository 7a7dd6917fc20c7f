"""What the statistic renormalized_output_norm promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.methods.statistics import LayerTokens
from mixtura.methods.statistics.renormalized_output_norm import RenormalizedOutputNorm


def test_shares_are_of_the_weights_there_are() -> None:
    # The second token chose one expert, the third none.
    weights = torch.tensor([[0.1, 0.3], [0.2, 0.0], [0.0, 0.0]])
    tokens = LayerTokens(chosen=torch.tensor([[0, 1], [2, 4], [4, 4]]), weights=weights)
    factor = RenormalizedOutputNorm().factor(tokens)
    assert (weights * factor)[:2].tolist() == [pytest.approx([0.25, 0.75]), pytest.approx([1.0, 0.0])]
    assert torch.isfinite(factor).all()


def test_weights_that_sum_to_one_are_as_they_are() -> None:
    weights = torch.tensor([[0.25, 0.75]])
    tokens = LayerTokens(chosen=torch.tensor([[0, 1]]), weights=weights)
    assert RenormalizedOutputNorm().factor(tokens).tolist() == [[1.0, 1.0]]
