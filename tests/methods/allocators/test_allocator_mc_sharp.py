"""What the allocator mc_sharp promises beyond its kind's contract."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mixtura.errors import SettingError
from mixtura.fitting.records import Parts, Prices
from mixtura.fitting.ruling import ruled, rules_of
from mixtura.methods.allocators import ExpertsSeen
from mixtura.methods.allocators.mc_sharp import McSharp

LAYERS, EXPERTS = 2, 4


def seen(seed: int = 0) -> ExpertsSeen:
    rng = np.random.default_rng(seed)
    number = LAYERS * EXPERTS
    bits = np.array([16.0, 4.0, 3.0, 2.0])
    return ExpertsSeen(
        np.repeat(np.arange(LAYERS), EXPERTS),
        rng.integers(1, 50, number),
        rng.uniform(0.1, 9.0, number),
        bits,
        rng.uniform(0.5, 2.0, number)[:, None] * np.array([0.0, 1.0, 4.0, 16.0]),
    )


@pytest.mark.parametrize("exponents", [(1.0, 1.5, 2.0), (0.0, 1.0, 1.0), (2.0, 0.0, 0.5)])
def test_the_product_by_a_loop(exponents: tuple[float, float, float]) -> None:
    alpha, beta, gamma = exponents
    given = seen()
    found = McSharp(alpha=alpha, beta=beta, gamma=gamma).losses(given)
    for layer in range(LAYERS):
        own = [expert for expert in range(LAYERS * EXPERTS) if given.layers[expert] == layer]
        loads = sum(int(given.loads[expert]) for expert in own)
        weights = sum(float(given.weights[expert]) for expert in own)
        for expert in own:
            frequency, weight = given.loads[expert] / loads, given.weights[expert] / weights
            for way in range(4):
                norm = float(given.errors[expert, way]) ** 0.5
                assert found[expert, way] == pytest.approx(frequency**alpha * weight**beta * norm**gamma)


def test_every_layer_gets_its_best_choice_of_all() -> None:
    """Every choice tried, as the paper's integer program would find it."""
    given = seen(3)
    sizes = np.tile(np.array([1600, 400, 300, 200, 0]), (LAYERS * EXPERTS, 1))
    errors = np.column_stack([given.errors, np.full(LAYERS * EXPERTS, 100.0)])
    parts = Parts(given.layers, np.tile(np.arange(EXPERTS), LAYERS))
    palette = type(Prices.__dataclass_fields__["palette"].default)(("keep", "4", "3", "2", "drop"), drop=4)
    prices = Prices(parts, sizes, errors, given.loads, palette, weights=given.weights)
    (rule,) = rules_of(["mc_sharp"], prices, 16.0)
    budget = LAYERS * 1200
    found = ruled(prices, rule, budget).choice
    for layer in range(LAYERS):
        own = np.flatnonzero(given.layers == layer)
        best = min(
            (
                sum(rule.losses[expert, way] for expert, way in zip(own, ways, strict=True))
                for ways in itertools.product(range(4), repeat=EXPERTS)
                if sum(sizes[0, way] for way in ways) <= 1200
            ),
        )
        chosen = [found[expert] for expert in own]
        assert sum(sizes[0, way] for way in chosen) <= 1200
        assert sum(
            rule.losses[expert, way] for expert, way in zip(own, chosen, strict=True)
        ) == pytest.approx(best)
        assert 4 not in chosen


def test_exponents_out_of_range() -> None:
    with pytest.raises(SettingError, match="beta"):
        McSharp(beta=-1)
    with pytest.raises(SettingError, match="gamma"):
        McSharp(gamma=float("nan"))
