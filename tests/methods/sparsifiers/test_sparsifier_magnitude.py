"""Gradual magnitude pruning by its curve, beside plain sorting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods.sparsifiers import Training
from mixtura.methods.sparsifiers.magnitude import Magnitude


def drawn(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(2, 5, 4, generator=generator), "b": 3 * torch.randn(6, 4, generator=generator)}


def training(step: int, num_steps: int = 100) -> Training:
    weights = drawn(1)
    ones = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    return Training(weights, drawn(2), ones, step, num_steps)


@pytest.mark.parametrize("step", [10, 35, 60, 80])
def test_the_largest_over_all_matrices_stay_as_many_as_the_curve_says(step: int) -> None:
    given = training(step)
    found = Magnitude(density=0.2, begin=0.1, end=0.6).masks(given)
    gone = min(1.0, (step - 10) / 50)
    count = round((0.2 + 0.8 * (1 - gone) ** 3) * 64)
    every = sorted(
        (-abs(float(w)), name, place) for name in given.weights
        for place, w in enumerate(given.weights[name].flatten())
    )  # fmt: skip
    wanted = {(name, place) for _, name, place in every[:count]}
    assert {
        (name, place) for name, mask in found.items() for place in mask.flatten().nonzero().flatten().tolist()
    } == wanted


def test_what_is_gone_stays_gone() -> None:
    given, sparsifier = training(70), Magnitude(density=0.5)
    masks = sparsifier.masks(replace(given, step=40))
    # Even where it would be the largest.
    weights = {name: torch.where(masks[name], weight, 100.0) for name, weight in given.weights.items()}
    later = sparsifier.masks(replace(given, weights=weights, masks=masks))
    assert all(bool((later[name] <= masks[name]).all()) for name in masks)
    assert sum(int(mask.sum()) for mask in later.values()) == 32


def test_when_masks_change() -> None:
    sparsifier = Magnitude(begin=0.25, end=0.7, every=10)
    assert [step for step in range(101) if sparsifier.due(step, 100)] == [30, 40, 50, 60, 70]
    # Where no step is in turn, all go at once; never after the last step.
    assert [step for step in range(8) if Magnitude().due(step, 7)] == [5]
    assert [step for step in range(8) if Magnitude(end=1.0).due(step, 7)] == [6]


def test_bad_settings() -> None:
    with pytest.raises(SettingError, match="density of Magnitude must be above 0"):
        Magnitude(density=0)
    with pytest.raises(SettingError, match=r"end of Magnitude must not be below begin, got 0\.2 and 0\.5"):
        Magnitude(begin=0.5, end=0.2)
    with pytest.raises(SettingError, match="every"):
        Magnitude(every=0)
