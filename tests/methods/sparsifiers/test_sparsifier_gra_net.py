"""Regrowth beside plain loops, and sparse starts by the rule of their shares."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from methods.sparsifiers.test_sparsifier_magnitude import training

from mixtura.errors import SettingError
from mixtura.methods.sparsifiers._shared import ErdosRenyi
from mixtura.methods.sparsifiers.gra_net import GraNet
from mixtura.methods.sparsifiers.magnitude import Magnitude


@pytest.mark.parametrize("step", [20, 50, 90])
def test_the_smallest_go_and_as_many_of_large_gradient_come(step: int) -> None:
    given = training(step)
    found = GraNet(density=0.3, rate=0.4).masks(given)
    pruned = Magnitude(density=0.3).masks(given)
    rate = 0.005 + 0.395 * (1 + math.cos(math.pi * step / 100)) / 2
    for name, mask in pruned.items():
        weight, gradient = (one[name].flatten().tolist() for one in (given.weights, given.gradients))
        left = {place for place, kept in enumerate(mask.flatten().tolist()) if kept}
        number = math.ceil(rate * len(left))
        left -= set(sorted(left, key=lambda place, w=weight: abs(w[place]))[:number])
        lacking = sorted(set(range(len(weight))) - left, key=lambda p, g=gradient: -abs(g[p]))
        left |= set(lacking[:number])
        assert set(found[name].flatten().nonzero().flatten().tolist()) == left
        assert int(found[name].sum()) == int(mask.sum())


def test_without_exchange_or_gradients_it_is_gradual_magnitude_pruning() -> None:
    given = training(40)
    plain = Magnitude(density=0.3).masks(given)
    none = replace(given, gradients={name: torch.zeros_like(w) for name, w in given.weights.items()})
    for found in (GraNet(density=0.3, rate=0.0).masks(given), GraNet(density=0.3).masks(none)):
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_exchange_goes_on_until_the_last_step_but_one() -> None:
    sparsifier = GraNet(every=10, end=0.5)
    assert [step for step in range(101) if sparsifier.due(step, 100)] == list(range(10, 100, 10))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_sparse_starts_by_sizes(density: float) -> None:
    shapes = {"wide": (400, 300), "narrow": (40, 300), "tiny": (4, 6)}
    shares = ErdosRenyi.shares(shapes, density)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(shares[name] * sizes[name] for name in shapes) == pytest.approx(density * sum(sizes.values()))
    assert shares["tiny"] == 1.0
    below = [name for name in ("wide", "narrow") if shares[name] < 1]
    factors = [shares[name] / (sum(shapes[name]) / sizes[name]) for name in below]
    assert factors == pytest.approx([factors[0]] * len(factors))
    weights = {name: torch.ones(2, *shape) for name, shape in shapes.items()}
    masks = GraNet(density=0.05, initial_density=density, seed=3).start(weights)
    for name, mask in masks.items():
        assert float(mask.float().mean()) == pytest.approx(shares[name], abs=0.03)
    again = GraNet(density=0.05, initial_density=density, seed=4).start(weights)
    assert not torch.equal(masks["wide"], again["wide"])


def test_bad_settings() -> None:
    with pytest.raises(SettingError, match="initial_density of GraNet must not be below density"):
        GraNet(density=0.5, initial_density=0.2)
    with pytest.raises(SettingError, match="rate"):
        GraNet(rate=1.5)
