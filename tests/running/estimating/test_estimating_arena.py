"""The arena of estimators: problems are what they say, baselines learn the same data, runs are kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mixtura.errors import UnknownNameError
from mixtura.methods import names
from mixtura.running.estimating.arena import HINDSIGHT, as_csv, hold, markdown
from mixtura.running.estimating.baselines import NAMES
from mixtura.running.estimating.lessons import Problem
from mixtura.running.estimating.measures import _wealth, num_weights
from mixtura.running.estimating.problems import NOT_COMPARED, PROBLEMS

BY_NAME = {one.name: one for one in PROBLEMS}


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda one: one.name)
def test_data_are_finite_and_drawn_from_the_seed(problem: Problem) -> None:
    first, again, other = (problem.draw(np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first.X, again.X)
    assert np.array_equal(first.new_y, again.new_y)
    assert not (first.X.shape == other.X.shape and np.array_equal(first.X, other.X))
    assert np.isfinite(first.X).all()
    assert np.isfinite(first.new_x).all()
    assert len(first.new_x) == len(first.new_y)
    assert problem.baselines in NAMES


def test_every_estimator_takes_part() -> None:
    compared = {name for one in PROBLEMS for name in one.entries}
    assert compared | NOT_COMPARED == set(names("estimators"))
    assert not compared & NOT_COMPARED


def test_no_window_of_the_test_was_learned() -> None:
    lesson = BY_NAME["wave"].draw(np.random.default_rng(0))
    learned = np.concatenate([lesson.X[:, 0], lesson.X[-1], lesson.y[-1]])
    assert not np.isin(lesson.new_x[:, 0], learned).any()


def test_rare_digits_are_rare() -> None:
    counts = np.bincount(BY_NAME["rare digits"].draw(np.random.default_rng(0)).y)
    assert (counts.max(), counts.min()) == (100, 1)


def test_baselines_of_a_market_by_loops() -> None:
    lesson = BY_NAME["market"].draw(np.random.default_rng(0))
    money = math.prod(sum(row) / 5 for row in lesson.new_x.tolist())
    best = [math.prod(lesson.new_x[:, asset].tolist()) for asset in range(5)]
    assert _wealth(None, "equal parts", lesson) == pytest.approx(math.log(money))
    assert _wealth(None, HINDSIGHT, lesson) == pytest.approx(math.log(max(best)))


def test_what_diffuses_obeys_its_equation() -> None:
    from mixtura.running.estimating.designs import sorbed

    start = np.full(17, 0.3)
    early, at, late = (sorbed(start, horizon, 8) for horizon in (299.0, 300.0, 301.0))
    bent = np.diff(at, 2) * 16**2
    slower = 1 + 0.71 / 0.29 * 2880 * 3.5e-4 * 0.874 * (at[1:-1] + 1e-6) ** -0.126
    assert np.allclose((late - early)[1:-1] / 2, 5e-4 / slower * bent, atol=2e-5)
    assert at[0] == 1
    assert at[-1] == pytest.approx(-5e-4 * (at[-2] - at[-1]) * 16, rel=0.2)
    assert (np.diff(at) < 0).all()


def test_a_field_that_stays_explains_nothing() -> None:
    from mixtura.running.estimating.judges import of_fields

    lesson = BY_NAME["sorption"].draw(np.random.default_rng(0))
    assert of_fields("state at the start", None, lesson, 0, 0) == 0
    assert of_fields("linear", None, lesson, 0, 0) > 0.9


def test_the_network_is_of_equal_size() -> None:
    from mixtura.running.estimating.baselines import NETWORK, plain_model

    problem = BY_NAME["diabetes"]
    lesson = problem.draw(np.random.default_rng(0))
    size = num_weights(problem, lesson)
    plain = plain_model(NETWORK, "numbers", size, 10, 1, 0).fit(lesson.X, lesson.y)[-1]
    made = sum(one.size for one in (*plain.coefs_, *plain.intercepts_))
    assert abs(made - size) < 12


def test_a_contest_is_kept_and_written(tmp_path: Path) -> None:
    said: list[str] = []
    table = hold(["universal_portfolio"], 2, tmp_path, said.append)
    assert [row.name for row in table] == sorted(
        ["universal_portfolio", "equal parts", HINDSIGHT],
        key=lambda name: -next(row.mean for row in table if row.name == name),
    )
    (judged,) = [row for row in table if row.verdict != "baseline"]
    assert judged.beside == "equal parts"
    rival = next(row for row in table if row.name == "equal parts")
    pairs = [a - b for a, b in zip(judged.values, rival.values, strict=True)]
    assert judged.difference == pytest.approx(np.mean(pairs))
    # With two seeds the interval is Student's with one degree of freedom.
    assert judged.half_width == pytest.approx(12.7062 * np.std(pairs, ddof=1) / 2**0.5, rel=1e-4)
    page = markdown(table, 2, "Here.")
    assert f"| {judged.difference:+.4f} |" in page
    assert judged.verdict in page
    assert len(as_csv(table).splitlines()) == 7
    # What is kept is read, not run again.
    for file in (tmp_path / "estimators").iterdir():
        file.write_text(json.dumps({"version": 1, "value": 7.0}))
    assert all(row.values == [7.0, 7.0] for row in hold(["market"], 2, tmp_path, said.append))


def test_an_unknown_entry_offers_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'mowst'"):
        hold(["mowts"], 1, tmp_path, print)
