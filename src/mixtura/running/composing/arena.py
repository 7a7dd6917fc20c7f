"""The arena of model routers: a table of outcomes, half to learn from and half to be measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from jaxtyping import Float

from mixtura.errors import UnknownNameError, UserError
from mixtura.methods import create, header, own_names
from mixtura.running.composing.calibrating import calibration_error
from mixtura.running.composing.encoder import Encode, HashedTfidf, Remembered
from mixtura.running.composing.fitted import FittedRouter, fit_model_router
from mixtura.running.composing.measures import area, curve, hull, middle, resampled
from mixtura.running.composing.tables import ReplayTable, split
from mixtura.types.models import PICO_PER_DOLLAR, Scores

# Lines that no method draws: the convex hull of single models, and a draw between its two ends.
HULL, BLIND = "zero_hull", "random_at_equal_cost"
# Methods that always take part, and what bounds all others.
BASELINES: Final = ("best_single", "cheapest", "random", "task_prior")
BOUND: Final = "oracle"
_TRAIN_SHARE: Final = 0.5
_LEAST_PROMPTS: Final = 40
NUM_DRAWS: Final = 400
Say = Callable[[str], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One router over all splits.

    Attributes:
        name: of the method, or of a line that none draws.
        area: mean score over budgets from the cheapest to the dearest single model.
        area_low, area_high: the 95 % bootstrap interval over prompts.
        over_hull: the area less that of the convex hull of single models on the same prompts.
        over_hull_low, over_hull_high: its interval.
        quality: mean score where cost does not matter.
        over_best: that less the best single model's, on the same prompts.
        over_best_low, over_best_high: its interval.
        cost: dollars for a thousand prompts there; NaN without costs.
        calibration: mean difference between expected and true score, over ten bins; NaN for lines.
        verdict: in words, beside the trivial.
    """

    name: str
    area: float
    area_low: float
    area_high: float
    over_hull: float
    over_hull_low: float
    over_hull_high: float
    quality: float
    over_best: float
    over_best_low: float
    over_best_high: float
    cost: float
    calibration: float
    verdict: str


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """One router on one split: by draw, its area, its quality and its cost where cost does not matter."""

    areas: Float[np.ndarray, " D"]
    quality: Float[np.ndarray, " D"]
    cost: float
    calibration: float


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Exam:
    """The prompts of a split that routers are measured on.

    Attributes:
        weights: of prompts, by draw.
        cheapest: the column of the model that cost least where routers learned. It is the left end of every
            curve: money that does not pay for a router's cheapest choices pays for some of them.
    """

    table: ReplayTable
    costs: Float[np.ndarray, "P M"]
    weights: Float[np.ndarray, "P D"]
    cheapest: int

    def measure(
        self, cost: Float[np.ndarray, "N P"], score: Float[np.ndarray, "N P"], calibration: float
    ) -> _Run:
        """What points, by price and prompt, come to; the first is where cost does not matter."""
        left = self.costs[:, self.cheapest][None], self.table.scores[:, self.cheapest][None]
        costs = np.concatenate([cost, left[0]]) @ self.weights
        scores = np.concatenate([score, left[1]]) @ self.weights
        singles = self.costs.mean(0)
        low, high = float(singles.min()), float(singles.max())
        areas = scores[0]
        if high > low:
            areas = np.array([area(costs[:, d], scores[:, d], low, high) for d in range(costs.shape[1])])
        return _Run(areas, scores[0], float(costs[0, 0]), calibration)

    def router(self, expected: Scores) -> _Run:
        """A router by what it expects; one that draws by weights of its own is one point, on average."""
        scores = self.table.scores
        wrong = calibration_error(expected.quality, scores)
        if expected.weights is not None:
            shares = expected.weights
            return self.measure((shares * self.costs).sum(1)[None], (shares * scores).sum(1)[None], wrong)
        return self.measure(*curve(expected, self.table.cards).per_prompt(scores, self.costs), wrong)

    def singles(self, columns: Sequence[int]) -> _Run:
        """Single models, and any mixture of two neighbours among them; the last is the best."""
        picked = list(columns)[::-1]
        return self.measure(self.costs[:, picked].T, self.table.scores[:, picked].T, float("nan"))


def hold(
    table: ReplayTable, names: Sequence[str], num_splits: int, say: Say, encode: Encode | None = None
) -> list[Standing]:
    """Fit and measure routers on several splits of a table.

    Args:
        table: outcomes; prompts with a hole are learned from and not measured on.
        names: methods; the baselines and the bound always take part, and none means all.
        num_splits: halvings of the prompts, each with another seed.
        say: told what is done.
        encode: see `fit_model_router`; it is given texts alone, never outcomes.

    Raises:
        UnknownNameError: there is no such method.
        UserError: too few prompts have an outcome of every model.
    """
    known = own_names("model_routers")
    for name in names:
        if name not in known:
            raise UnknownNameError("model router", name, known)
    full = len(table.complete().prompts)
    if full < _LEAST_PROMPTS or len(table.cards) < 2:
        raise UserError(
            f"the arena takes {_LEAST_PROMPTS} prompts or more with a score of each of two models or more; "
            f"the table has {full} such prompts of {len(table.cards)} models and {table.num_holes} holes; "
            "fill them, or leave out models that answered few prompts"
        )
    chosen = [name for name in known if not names or name in (*names, *BASELINES, BOUND)]
    runs: dict[str, list[_Run]] = {}
    for seed in range(num_splits):
        for name, run in _one_split(table, chosen, seed, num_splits, say, encode):
            runs.setdefault(name, []).append(run)
    hulls, bests = runs[HULL], runs["best_single"]
    table_of = [_standing(name, found, hulls, bests) for name, found in runs.items()]
    return sorted(table_of, key=lambda one: (-one.area, one.name))


def _one_split(
    table: ReplayTable, names: Sequence[str], seed: int, num_splits: int, say: Say, encode: Encode | None
) -> list[tuple[str, _Run]]:
    train, rest = split(table, _TRAIN_SHARE, seed)
    test = rest.complete()
    if encode is None:
        hashed = HashedTfidf()
        hashed.fit([prompt.text for prompt in train.prompts])
        encode = hashed
    encode = Remembered(encode)
    singles = _known_costs(train, train).mean(0)
    weights = resampled(len(test.prompts), NUM_DRAWS, seed)
    exam = _Exam(test, _known_costs(test, train), weights, int(singles.argmin()))
    made = []
    for name in names:
        say(f"split {seed + 1} of {num_splits}: {name}, {len(train.prompts)} prompts to learn from")
        learned = test if name == BOUND else train
        missing = _missing_label(name, train)
        if missing:
            say(f"{name} is left out: the prompts have no label {missing!r}")
            continue
        router: FittedRouter = fit_model_router(learned, name, encode, seed)
        made.append((name, exam.router(router.scores(test.prompts, test.cards))))
    means = np.nanmean(train.scores, axis=0)
    line = hull(singles, means)
    return [*made, (HULL, exam.singles(line)), (BLIND, exam.singles([line[0], line[-1]]))]


def _missing_label(name: str, table: ReplayTable) -> str:
    """The label that a method reads and no prompt has; empty where there is none such."""
    if "reads:labels" not in header("model_routers", name).tags:
        return ""
    label: str = create("model_routers", name).label
    return "" if any(label in prompt.labels for prompt in table.prompts) else label


def _known_costs(table: ReplayTable, train: ReplayTable) -> Float[np.ndarray, "P M"]:
    """Costs of a table, a model's mean where one is not known; 0 where nobody knows any."""
    if np.isnan(train.costs).all():
        return np.zeros_like(table.costs)
    missing = [
        name for name, column in zip(train.names, train.costs.T, strict=True) if np.isnan(column).all()
    ]
    if missing:
        raise UserError(
            f"some models of the table have costs and {missing[0]} has none; give its cards prices and its "
            "outcomes tokens, or leave all costs away"
        )
    return np.where(np.isnan(table.costs), np.nanmean(train.costs, axis=0), table.costs)


def _standing(name: str, runs: Sequence[_Run], hulls: Sequence[_Run], bests: Sequence[_Run]) -> Standing:
    areas, quality = (np.mean([getattr(run, key) for run in runs], axis=0) for key in ("areas", "quality"))
    over_hull = areas - np.mean([run.areas for run in hulls], axis=0)
    over_best = quality - np.mean([run.quality for run in bests], axis=0)
    cost = float(np.mean([run.cost for run in runs])) * 1000 / PICO_PER_DOLLAR
    (area_low, area_high), gains, better = middle(areas), middle(over_hull), middle(over_best)
    return Standing(
        name=name,
        area=float(areas[0]),
        area_low=area_low,
        area_high=area_high,
        over_hull=float(over_hull[0]),
        over_hull_low=gains[0],
        over_hull_high=gains[1],
        quality=float(quality[0]),
        over_best=float(over_best[0]),
        over_best_low=better[0],
        over_best_high=better[1],
        cost=cost,
        calibration=float(np.mean([run.calibration for run in runs])),
        verdict=_verdict(name, gains, better),
    )


def _verdict(name: str, gains: tuple[float, float], better: tuple[float, float]) -> str:
    if name == BOUND:
        return "knows the outcomes: a bound"
    if name in (HULL, BLIND, *BASELINES[:3]):
        return "trivial"
    said = [_beside(gains, "single models mixed")]
    if better[1] < 0 or better[0] > 0:
        said.append(_beside(better, "the best single model"))
    return "; ".join(said)


def _beside(interval: tuple[float, float], what: str) -> str:
    if interval[0] > 0:
        return f"beats {what}"
    return f"behind {what}" if interval[1] < 0 else f"does not beat {what}"
