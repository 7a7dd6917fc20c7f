"""Directions, filters and guidance by loops; what is drawn lies nearer to the front than what was learned."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators._frontiers import (
    angles,
    choose,
    directions,
    hypervolume,
    spacing,
    undominated,
)
from mixtura.methods.estimators.pareto_flow import ParetoFlow


def zdt2(x: np.ndarray) -> np.ndarray:
    g = 1 + 9 * x[:, 1:].mean(1)
    return np.stack([x[:, 0], g * (1 - (x[:, 0] / g) ** 2)], axis=1)


@pytest.mark.parametrize(("num", "least", "parts"), [(2, 10, 9), (3, 10, 3), (4, 30, 4)])
def test_directions_are_the_simplex_lattice(num: int, least: int, parts: int) -> None:
    found = {tuple(round(parts * w) for w in row) for row in directions(num, least).tolist()}
    expected = {row for row in product(range(parts + 1), repeat=num) if sum(row) == parts}
    assert found == expected
    assert len(expected) >= least > math.comb(num + parts - 2, parts - 1)
    assert directions(1, 50).tolist() == [[1.0]]


def test_who_is_not_dominated_by_loops() -> None:
    rows = np.random.default_rng(0).integers(0, 4, (30, 3)).astype(float)
    expected = [
        not any(all(a <= b for a, b in zip(o, r, strict=True)) and any(o < r) for o in rows) for r in rows
    ]
    assert undominated(rows).tolist() == expected


def test_hypervolume_by_counting() -> None:
    points = np.array([[0.2, 0.7], [0.5, 0.4], [0.6, 0.6], [0.9, 0.1], [2.0, 0.0]])
    grid = (np.arange(200) + 0.5) / 200
    inside = [any(a <= x and b <= y for a, b in points) for x in grid for y in grid]
    assert hypervolume(points, (1.0, 1.0)) == pytest.approx(np.mean(inside), abs=1e-6)


def test_a_choice_by_loops() -> None:
    near, found = spacing(directions(2, 6))
    assert sorted(near[2].tolist()) == [1, 2, 3]
    ends = [math.atan2(0.6, 0.4), math.atan2(0.8, 0.2), math.atan2(0.4, 0.6)]
    assert float(found[2]) == pytest.approx((abs(ends[1] - ends[0]) + abs(ends[2] - ends[0])) / 2)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(6, 9, 2, generator=generator, dtype=torch.float64)
    weights = directions(2, 6)
    widest = torch.full((6,), 0.15, dtype=torch.float64)
    for row, taken in enumerate(choose(scores, weights, widest).tolist()):
        w = weights[row].tolist()
        apart = []
        for a, b in scores[row].tolist():
            cosine = (a * w[0] + b * w[1]) / math.hypot(a, b) / math.hypot(*w)
            apart.append(math.acos(min(1.0, cosine)))
        near = [place for place, angle in enumerate(apart) if angle <= 0.15 or angle == min(apart)]
        worth = {place: float(scores[row, place] @ weights[row]) for place in near}
        assert taken == max(worth, key=lambda place: worth[place])
    assert angles(torch.zeros(1, 2), torch.ones(1, 2)).tolist() == pytest.approx([math.pi / 2])


def test_judges_bend_the_flow_down_their_slope() -> None:
    X = np.random.default_rng(0).random((60, 3))
    model = ParetoFlow(epochs=5, num_directions=4).fit(X, zdt2(X))
    module, x = model.module_, torch.randn(4, 3, dtype=torch.float64)
    weights, time = directions(2, 4), 0.9
    with torch.no_grad():
        plain, end = module.ends(x, time)
        assert torch.allclose(end, x + 0.1 * plain)
        bent = module.bent(x, weights, time, strength=2.0, step=0.01) - plain
        for row in range(4):
            for column in range(3):
                moved = [end[row].clone(), end[row].clone()]
                moved[0][column] -= 1e-5
                moved[1][column] += 1e-5
                low, high = (float((module.objectives(m[None]) * weights[row]).sum()) for m in moved)
                slope = -(high - low) / 2e-5
                assert float(bent[row, column]) == pytest.approx(2 * 0.1 / 0.9 * slope, abs=1e-6)


def test_without_guidance_it_is_the_plain_flow() -> None:
    X = np.random.default_rng(0).random((60, 3))
    model = ParetoFlow(epochs=3, num_directions=5, steps=7, guide_from=1.0, random_state=2).fit(X, zdt2(X))
    torch.manual_seed(2)
    x = torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        for step in range(7):
            time = torch.full((5, 1), step / 7, dtype=torch.float64)
            x = x + model.module_.flow(x + model.module_.clock(time)) / 7
    torch.manual_seed(2)
    found = model.module_.flow_down(model, directions(2, 5))
    low, high = torch.from_numpy(model.bounds_)
    assert torch.allclose(found, x.clamp(low, high))


def test_what_is_drawn_beats_what_was_learned_and_stays_in_bounds(tmp_path: Path) -> None:
    X = np.random.default_rng(0).random((300, 4))
    model = ParetoFlow(epochs=60, num_directions=30).fit(X, zdt2(X))
    drawn = model.sample(30)
    assert 1 < len(drawn) <= 30
    assert (drawn >= X.min(0) - 1e-9).all()
    assert (drawn <= X.max(0) + 1e-9).all()
    assert undominated(model.predict(drawn)).all()
    worst = (1.1, 10.0)
    assert hypervolume(zdt2(drawn), worst) > hypervolume(zdt2(X), worst) + 0.4
    model.save(tmp_path / "kept")
    assert np.array_equal(ParetoFlow.load(tmp_path / "kept").sample(30), drawn)
    routing = model.route(drawn)
    assert len(set(routing.expert_ids.tolist())) > 3


def test_one_objective_and_bad_settings() -> None:
    X = np.random.default_rng(0).random((40, 3))
    model = ParetoFlow(epochs=5, steps=5).fit(X, X[:, 0])
    assert model.predict(X).shape == (40,)
    assert len(model.sample(4)) == 1
    with pytest.raises(SettingError, match="num of sample must be in"):
        model.sample(0)
    with pytest.raises(SettingError, match="guide_from of ParetoFlow must be in"):
        ParetoFlow(guide_from=1.5).fit(X, X[:, 0])
    with pytest.raises(UserError, match="finite numbers"):
        ParetoFlow().fit(np.where(X > 0.9, np.nan, X), X[:, 0])
