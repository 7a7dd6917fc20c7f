"""One run of the arena of estimators: an entry learns a problem's data of a seed, and is measured."""

from __future__ import annotations

from typing import Any

import numpy as np

from mixtura.methods import create, names
from mixtura.running.estimating.baselines import LINEAR, NETWORK, SEASON, online_model, plain_model
from mixtura.running.estimating.judges import JUDGES
from mixtura.running.estimating.lessons import Lesson, Problem

# Rows of a stream that are predicted before they are learned.
_BATCH = 50


def measure(problem: Problem, entry: str, seed: int) -> float:
    """What an entry comes to on a problem; larger is better."""
    lesson = problem.draw(np.random.default_rng([seed, len(problem.name)]))
    if problem.baselines in JUDGES:
        size = num_weights(problem, lesson) if entry == NETWORK else 0
        return JUDGES[problem.baselines](entry, _made(problem, entry, seed), lesson, size, seed)
    if problem.baselines == "streams":
        return _before_learning(_made(problem, entry, seed) or online_model(entry, seed), lesson)
    if problem.baselines == "markets":
        return _wealth(_made(problem, entry, seed), entry, lesson)
    if problem.baselines == "series" and entry not in (*problem.entries, LINEAR) and "season" in entry:
        return _r2(lesson.new_y, _season_ago(lesson, lesson.new_y.shape[1]))
    model = _made(problem, entry, seed)
    if problem.baselines == "tasks":
        return _sparse_area(problem, entry, model, lesson, seed)
    if problem.baselines == "nodes":
        return _of_the_rest(problem, entry, model, lesson, seed)
    kind = "classes" if problem.baselines == "classes" else "numbers"
    model = model or _plain(problem, entry, kind, lesson, seed)
    model.fit(lesson.X, lesson.y)
    if problem.measure == "log likelihood":
        shares = model.predict_proba(lesson.new_x)
        given = shares[np.arange(len(shares)), np.searchsorted(model.classes_, lesson.new_y)]
        return float(np.log(np.maximum(given, 1e-6)).mean())
    if problem.measure == "area":
        return _area(lesson.new_y, model.predict_proba(lesson.new_x)[:, 1])
    return _judged(problem.measure, lesson.new_y, model.predict(lesson.new_x))


def _made(problem: Problem, entry: str, seed: int) -> Any:
    """The estimator of the entry; None for a baseline."""
    if entry not in problem.entries or entry not in names("estimators"):
        return None
    return create("estimators", entry, **{**problem.entries[entry], "random_state": seed})


def _plain(problem: Problem, entry: str, kind: str, lesson: Lesson, seed: int) -> Any:
    d_out = len(np.unique(lesson.y)) if kind == "classes" else lesson.y.reshape(len(lesson.y), -1).shape[1]
    return plain_model(entry, kind, num_weights(problem, lesson), lesson.X.shape[1], d_out, seed)


def num_weights(problem: Problem, lesson: Lesson) -> int:
    """Trained numbers of the problem's first estimator, which a network of equal size has, too."""
    first = create("estimators", next(iter(problem.entries)), **next(iter(problem.entries.values())))
    more = {name: value for name, value in lesson.more.items() if name == "edges"}
    first.set_params(epochs=1).fit(lesson.X, lesson.y, **more)
    return sum(one.numel() for one in first.module_.parameters() if one.requires_grad)


def _area(y: np.ndarray, said: np.ndarray) -> float:
    """Under the curve of right alarms over false ones."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, said))


def _judged(how: str, y: np.ndarray, said: np.ndarray) -> float:
    from sklearn.metrics import balanced_accuracy_score

    if how == "even accuracy":
        return float(balanced_accuracy_score(y, said))
    return float((y == said).mean()) if "accuracy" in how else _r2(y, said)


def _r2(y: np.ndarray, said: np.ndarray) -> float:
    from sklearn.metrics import r2_score

    return float(r2_score(y, said))


def _season_ago(lesson: Lesson, num: int) -> np.ndarray:
    start = lesson.new_x.shape[1] - SEASON
    return lesson.new_x[:, start : start + num]


def _sparse_area(problem: Problem, entry: str, model: Any, lesson: Lesson, seed: int) -> float:
    from sklearn.metrics import roc_auc_score

    if model is not None:
        said = model.fit(lesson.X, lesson.y).predict_proba(lesson.new_x)[:, -1]
        return float(roc_auc_score(lesson.new_y[:, -1], said))
    known = ~np.isnan(lesson.y[:, -1])
    d_in, size = lesson.X.shape[1], num_weights(problem, lesson)
    plain = plain_model(entry, "classes", size, d_in, 1, seed).fit(lesson.X[known], lesson.y[known, -1])
    return float(roc_auc_score(lesson.new_y[:, -1], plain.predict_proba(lesson.new_x)[:, 1]))


def _of_the_rest(problem: Problem, entry: str, model: Any, lesson: Lesson, seed: int) -> float:
    known = lesson.y != -1
    if model is not None:
        said = model.fit(lesson.X, lesson.y, **lesson.more).predict(lesson.new_x, **lesson.more)
    else:
        d_in, size = lesson.X.shape[1], num_weights(problem, lesson)
        plain = plain_model(entry, "classes", size, d_in, 10, seed).fit(lesson.X[known], lesson.y[known])
        said = plain.predict(lesson.new_x)
    return float((said == lesson.new_y)[~known].mean())


def _before_learning(model: Any, lesson: Lesson) -> float:
    """The share of rows that were predicted rightly before they were learned, the first batch left out."""
    classes = np.unique(lesson.y)
    right = []
    for start in range(0, len(lesson.X), _BATCH):
        X, y = lesson.X[start : start + _BATCH], lesson.y[start : start + _BATCH]
        if start:
            right.append(model.predict(X) == lesson.new_y[start : start + _BATCH])
        model.partial_fit(X, y, classes=classes)
    return float(np.concatenate(right).mean())


def _wealth(model: Any, entry: str, lesson: Lesson) -> float:
    growth = lesson.new_x
    if model is not None:
        return float(np.log(model.score(growth)))
    if entry == "equal parts":
        return float(np.log(growth.mean(1)).sum())
    return float(np.log(growth).sum(0).max())
