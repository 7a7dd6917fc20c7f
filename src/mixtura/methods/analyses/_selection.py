"""Choosing the best of several methods for a case that was not measured, from cases that were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from mixtura.methods.analyses import Cell, Table
from mixtura.methods.analyses._shared import mean_of

Row = Mapping[str, Cell]


@final
@dataclass(frozen=True, slots=True)
class Case:
    """What was measured under the same circumstances: each method's score, more being better."""

    features: Row
    scores: Mapping[str, float]


def cases_of(rows: Sequence[Row], method: str, score: str, features: Sequence[str]) -> list[Case]:
    """Rows that agree in their features as one case, of those where two methods or more were measured.

    Of a method measured several times in a case the mean counts.
    """
    found: dict[tuple[Cell, ...], dict[str, list[float]]] = {}
    for row in rows:
        value = row[score]
        assert isinstance(value, int | float)
        key = tuple(row.get(name) for name in features)
        found.setdefault(key, {}).setdefault(str(row[method]), []).append(float(value))
    return [
        Case(dict(zip(features, key, strict=True)), {name: float(np.mean(x)) for name, x in scores.items()})
        for key, scores in found.items()
        if len(scores) > 1
    ]


def shared_features(rows: Sequence[Row], method: str, score: str) -> tuple[str, ...]:
    """Columns of words and whole numbers whose values are the same ones for every method."""
    methods = {str(row[method]) for row in rows}
    found = []
    for name in dict.fromkeys(key for row in rows for key in row):
        if name in (method, score) or any(isinstance(row.get(name), float) for row in rows):
            continue
        values = [{row.get(name) for row in rows if str(row[method]) == one} for one in methods]
        if all(one == values[0] for one in values):
            found.append(name)
    return tuple(found)


@final
class Learner:
    """Predicts the logarithm of each method's score by a ridge regression on the features of cases.

    Numbers enter as logarithms where all are positive, words as one column each; all are standardised.
    """

    def __init__(self, cases: Sequence[Case], ridge: float) -> None:
        self._columns = _columns([case.features for case in cases])
        raw = np.array([self._raw(case.features) for case in cases])
        self._mean, self._spread = raw.mean(0), np.where(raw.std(0) > 0, raw.std(0), 1.0)
        self._weights: dict[str, np.ndarray] = {}
        for name in sorted({name for case in cases for name in case.scores}):
            kept = [place for place, case in enumerate(cases) if name in case.scores]
            design = self._design(raw[kept])
            wanted = np.log([max(cases[place].scores[name], 1e-300) for place in kept])
            penalty = ridge * np.eye(design.shape[1])
            penalty[0, 0] = 0.0
            self._weights[name] = np.linalg.solve(
                design.T @ design + penalty + 1e-12 * np.eye(len(penalty)), design.T @ wanted
            )

    def predict(self, features: Row) -> dict[str, float]:
        """The score of each method that was ever measured."""
        design = self._design(np.array([self._raw(features)]))
        return {name: float(np.exp((design @ weights)[0])) for name, weights in self._weights.items()}

    def _design(self, raw: np.ndarray) -> np.ndarray:
        normed = (raw - self._mean) / self._spread
        return np.concatenate([np.ones((len(raw), 1)), normed], 1)

    def _raw(self, features: Row) -> list[float]:
        return [read(features.get(name), word, log) for name, word, log in self._columns]


def read(value: Cell, word: str | None, log: bool) -> float:
    """A feature as a number: whether it is a word, or its own value, perhaps as a logarithm."""
    if word is not None:
        return float(str(value) == word)
    number = 0.0 if isinstance(value, str | None) else float(value)
    return float(np.log(max(number, 1e-12))) if log else number


def _columns(rows: Sequence[Row]) -> list[tuple[str, str | None, bool]]:
    """Of each column the feature, the word it stands for, and whether it is a logarithm."""
    found: list[tuple[str, str | None, bool]] = []
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        if all(isinstance(one, int | float) for one in values):
            found.append((name, None, all(one > 0 for one in values if isinstance(one, int | float))))
        else:
            found += [(name, word, False) for word in sorted({str(one) for one in values})]
    return found


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What a choice for one case lost against the best that was measured in it: shares of its score."""

    group: Cell
    chosen: str
    regret: float
    of_average: float
    of_chance: float


def left_out(cases: Sequence[Case], group: str, ridge: float) -> list[Tried]:
    """What is chosen in the cases of each value of a feature after learning from all the others."""
    found = []
    for value in dict.fromkeys(case.features[group] for case in cases):
        known = [case for case in cases if case.features[group] != value]
        learner, average = Learner(known, ridge), _average(known)
        for case in (one for one in cases if one.features[group] == value):
            best = max(case.scores.values())
            losses = {name: 1 - score / best for name, score in case.scores.items()}
            chosen = _first(learner.predict(case.features), losses)
            found.append(
                Tried(
                    group=value,
                    chosen=chosen,
                    regret=losses[chosen],
                    of_average=losses[_first(average, losses)],
                    of_chance=sum(losses.values()) / len(losses),
                )
            )
    return found


def _average(cases: Sequence[Case]) -> dict[str, float]:
    """Each method's mean share of the best score of a case."""
    found: dict[str, list[float]] = {}
    for case in cases:
        best = max(case.scores.values())
        for name, value in case.scores.items():
            found.setdefault(name, []).append(value / best)
    return {name: sum(shares) / len(shares) for name, shares in found.items()}


def _first(predicted: Mapping[str, float], able: Mapping[str, float]) -> str:
    """Of the methods that were measured in a case the one that is predicted to be best."""
    return max(able, key=lambda name: (predicted.get(name, float("-inf")), name))


def by_group(name: str, found: Sequence[Tried]) -> Table:
    """What is lost in each group, with the methods that were chosen there."""
    rows = []
    for group in dict.fromkeys(one.group for one in found):
        part = [one for one in found if one.group == group]
        chosen = ", ".join(sorted({one.chosen for one in part}))
        losses = [(one.regret, one.of_average, one.of_chance) for one in part]
        means = (mean_of(column) for column in zip(*losses, strict=True))
        rows.append((str(group), len(part), *means, chosen))
    columns = (name, "cases", "regret", "best on average", "by chance", "chosen")
    title = "What is lost against the best, each group left out in turn"
    return Table(title=title, columns=columns, rows=tuple(rows))
