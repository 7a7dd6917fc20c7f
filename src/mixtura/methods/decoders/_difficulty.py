"""How hard a question is, predicted of what the model makes of it by a ridge regression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def fitted(
    keys: Float[Tensor, "S D"], wanted: Float[Tensor, " S"], ridge: float
) -> tuple[Float[Tensor, " D"], Float[Tensor, ""], Float[Tensor, " S"]]:
    """Weights and offset of a ridge regression, and what it predicts of each row fitted on the others."""
    centre = keys.mean(0)
    spread = keys - centre
    kernel = spread @ spread.T
    inverse = torch.linalg.inv(kernel + ridge * torch.eye(len(keys)).double())
    weights = spread.T @ (inverse @ (wanted - wanted.mean()))
    # A row's share in its own prediction, by the mean and by the regression.
    hat = kernel @ inverse + 1 / len(keys)
    residuals = (wanted - wanted.mean() - spread @ weights) / (1 - hat.diagonal()).clamp(min=1e-9)
    return weights, wanted.mean() - centre @ weights, wanted - residuals


def key_of(hidden: Float[Tensor, "T D"]) -> Float[Tensor, " D"]:
    """The mean state, of length one."""
    mean_state = hidden.double().mean(0).cpu()
    key: Tensor = mean_state / mean_state.norm().clamp(min=1e-30)
    return key


def explained(predicted: Float[Tensor, " S"], wanted: Sequence[float]) -> float:
    """The share of the variance that predictions of rows left out explain; below 0 where they harm."""
    truth = torch.tensor(wanted).double()
    left, there = (truth - predicted).square().sum(), (truth - truth.mean()).square().sum()
    return float(1 - left / there.clamp(min=1e-30))
