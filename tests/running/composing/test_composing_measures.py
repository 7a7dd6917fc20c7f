"""Curves, hulls, calibration and estimates from logs, beside plain computations of the same."""

from __future__ import annotations

import numpy as np
import pytest

from mixtura.errors import UserError
from mixtura.running.composing.calibrating import Calibration, calibrate, calibration_error
from mixtura.running.composing.measures import area, curve, hull, middle, resampled
from mixtura.running.composing.off_policy import off_policy
from mixtura.types.models import PICO_PER_DOLLAR, Decision, ModelCard, Outcome, Scores


def test_the_area_of_a_broken_line() -> None:
    cost, quality = np.array([0.0, 2.0, 4.0]), np.array([0.0, 1.0, 1.0])
    assert area(cost, quality, 0.0, 4.0) == pytest.approx(0.75)
    # Beyond its dearest point a curve keeps its quality, and the order of points does not matter.
    assert area(cost[::-1], quality[::-1], 0.0, 8.0) == pytest.approx(0.875)


def test_the_hull_leaves_out_what_a_mixture_beats() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        cost, quality = generator.random((2, 7))
        line = hull(cost, quality)
        assert line[0] == int(cost.argmin()) or quality[line[0]] >= quality[cost.argmin()]
        assert line[-1] == int(quality.argmax())
        # No model lies above the line, as far as it goes.
        for c, q in zip(cost, quality, strict=True):
            if c >= cost[line[0]]:
                assert q <= np.interp(c, cost[line], quality[line]) + 1e-12


def test_a_curve_goes_from_the_best_to_the_cheapest() -> None:
    quality = np.array([[0.9, 0.5, 0.1], [0.2, 0.6, 0.1]])
    cost = np.tile([3e9, 2e9, 1e9], (2, 1))
    cards = [ModelCard(name=name) for name in "abc"]
    choices = curve(Scores(quality, quality, cost), cards).choices
    assert choices[0].tolist() == [0, 1]
    assert choices[-1].tolist() == [2, 2]
    spent = cost[np.arange(2), choices].sum(1)
    assert (np.diff(spent) <= 0).all()


def test_resampling_estimates_the_error_of_a_mean() -> None:
    values = np.random.default_rng(1).random(400)
    drawn = values @ resampled(400, 2000, 0)
    assert drawn[0] == pytest.approx(values.mean())
    low, high = middle(drawn)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


def test_calibration_finds_the_line_that_outcomes_came_from() -> None:
    generator = np.random.default_rng(2)
    odds = generator.normal(size=(4000, 3))
    true = 1 / (1 + np.exp(-(0.5 * odds - 1)))
    scores = (generator.random(true.shape) < true).astype(float)
    quality = 1 / (1 + np.exp(-odds))
    found = calibrate(quality, scores)
    assert (found.slope, found.offset) == pytest.approx((0.5, -1.0), abs=0.05)
    assert found.error_after < 0.02 < found.error_before
    assert np.allclose(found(quality), true, atol=0.02)


def test_calibration_changes_no_order_and_no_hole() -> None:
    generator = np.random.default_rng(3)
    quality = generator.random((50, 4))
    quality[0, 0] = np.nan
    # Scores that fall where expectations rise.
    found = calibrate(quality, (np.nan_to_num(quality) < 0.5).astype(float))
    after = found(quality)
    assert np.isnan(after[0, 0])
    assert (after[1:].argsort(1) == quality[1:].argsort(1)).all()
    assert np.array_equal(Calibration()(quality), quality, equal_nan=True)


def test_errors_follow_the_slope_of_the_calibration() -> None:
    line = Calibration(slope=0.7, offset=0.3, num_prompts=1)
    quality, error = np.array([[0.3, 0.8]]), np.array([[0.01, 0.02]])
    step = 1e-6
    slope = (line(quality + step) - line(quality - step)) / (2 * step)
    assert np.allclose(line.errors(quality, error), slope * error)


def test_the_calibration_error_by_hand() -> None:
    quality, scores = np.array([[0.15, 0.15, 0.95]]), np.array([[0.0, 1.0, 1.0]])
    assert calibration_error(quality, scores) == pytest.approx((0.7 + 0.05) / 3)


CHANCE = {"a": 0.3, "b": 0.6, "c": 0.8}
LOGGED = {"a": 0.5, "b": 0.3, "c": 0.2}


def simulated(seed: int, size: int = 300) -> tuple[list[Outcome], list[Decision]]:
    """A log of a policy that mostly asks the worst model, and decisions of one that mostly asks the best."""
    generator = np.random.default_rng(seed)
    names = list(LOGGED)
    log, made = [], []
    for n in range(size):
        name = names[generator.choice(3, p=list(LOGGED.values()))]
        score = float(generator.random() < CHANCE[name])
        log.append(Outcome(prompt=str(n), model=name, score=score, propensity=LOGGED[name]))
        made.append(
            Decision(
                prompt=str(n),
                models=("c",),
                propensities={"b": 0.2, "c": 0.8},
                quality={},
                cost={},
                ineligible={},
            )
        )
    return log, made


def test_estimates_from_logs_are_unbiased_and_their_intervals_cover() -> None:
    truth = 0.2 * CHANCE["b"] + 0.8 * CHANCE["c"]
    wrong_model = {(str(n), name): 0.5 for n in range(300) for name in CHANCE}
    found = [off_policy(*simulated(seed), wrong_model) for seed in range(200)]
    for name in ("ips", "snips", "dr"):
        values = np.array([one[name].value for one in found])
        assert abs(values.mean() - truth) < 3 * values.std() / 200**0.5 + 0.005, name
        covered = np.mean([one[name].low <= truth <= one[name].high for one in found])
        assert 0.88 <= covered <= 1.0, (name, covered)
    spread = {name: np.std([one[name].value for one in found]) for name in ("ips", "snips", "dr")}
    assert spread["snips"] < spread["ips"]
    assert spread["dr"] < spread["ips"]
    # The best model was logged for a fifth of the prompts.
    assert 50 < np.mean([one["ips"].effective for one in found]) < 100


def test_a_perfect_model_of_scores_leaves_no_noise_but_the_outcomes() -> None:
    log, made = simulated(0)
    exact = {(one.prompt, name): CHANCE[name] for one in log for name in CHANCE}
    assert off_policy(log, made, exact)["dr"].value == pytest.approx(0.76, abs=0.1)


def test_logs_that_cannot_be_used() -> None:
    log, made = simulated(0, 5)
    with pytest.raises(UserError, match="outcome 1 of the log has no propensity"):
        off_policy([Outcome(prompt="0", model="a", score=1.0)], made)
    with pytest.raises(UserError, match=r"has the propensity 0\.0; it must be in"):
        off_policy([Outcome(prompt="0", model="a", score=1.0, propensity=0.0)], made)
    with pytest.raises(UserError, match="there is no decision for the prompt '0'"):
        off_policy(log, made[1:])
    with pytest.raises(UserError, match="no outcome of a model that the policy would choose; explore more"):
        off_policy([Outcome(prompt="0", model="a", score=1.0, propensity=0.5)], made)


def test_dollars_are_whole_numbers() -> None:
    assert PICO_PER_DOLLAR * 0.0375 / 1e6 == 37_500
