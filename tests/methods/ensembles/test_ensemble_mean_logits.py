"""The mean of logits against a product of what each model holds for probable."""

from __future__ import annotations

import pytest
import torch

from mixtura.authoring.contracts.ensembles import said
from mixtura.errors import SettingError, UserError
from mixtura.methods.ensembles.mean_logits import MeanLogits

LOGITS = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.2, -0.4], [0.0, 0.7, 0.1]])


@pytest.mark.parametrize("weights", [[], [1.0, 2.0, 5.0], [0, 0, 4]])
def test_it_is_the_weighted_geometric_mean(weights: list[float]) -> None:
    given = weights or [1.0, 1.0, 1.0]
    wanted = []
    for token in range(3):
        product = 1.0
        for model, weight in enumerate(given):
            product *= float(LOGITS[model].exp()[token] / LOGITS[model].exp().sum()) ** (weight / sum(given))
        wanted.append(product)
    found = MeanLogits(weights=weights)(said(LOGITS)).log_probabilities.exp()[0, 0]
    assert found.tolist() == pytest.approx([one / sum(wanted) for one in wanted], rel=1e-5)


def test_a_model_of_no_weight_is_not_heard_where_it_forbids_a_token() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, float("-inf")]])
    found = MeanLogits(weights=[1.0, 0.0])(said(logits)).log_probabilities.exp()[0, 0]
    assert torch.allclose(found, logits[0].softmax(-1))


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0, 0.0], [1.0] * 4])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match="a share for each of 3 models"):
        MeanLogits(weights=weights)(said(LOGITS))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_out_of_range_are_refused(weight: float) -> None:
    with pytest.raises(SettingError, match="weights"):
        MeanLogits(weights=[weight, 1.0, 1.0])
