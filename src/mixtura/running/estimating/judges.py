"""How entries are measured where the answer is no column of a table; larger is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from mixtura.methods import create
from mixtura.methods.estimators import hypervolume, undominated
from mixtura.running.estimating.baselines import LINEAR, PENALTY, WHOLE, plain_model
from mixtura.running.estimating.designs import NUM_BLOCKS, WEIGHTS, costs
from mixtura.running.estimating.lessons import Lesson

# Designs that may be drawn, and the corner that they are measured from.
_NUM_DRAWN: Final = 40
_WORST: Final = (4.0 * NUM_BLOCKS, 40.0)
_NUM_TRIED: Final = 4000


def of_the_rare(entry: str, model: Any, lesson: Lesson, size: int, seed: int) -> float:
    """The coefficient of determination of the last measure, which few rows have."""
    from sklearn.metrics import r2_score

    if model is not None:
        said = model.fit(lesson.X, lesson.y).predict(lesson.new_x)[:, -1]
    else:
        known = ~np.isnan(lesson.y[:, -1])
        plain = plain_model(entry, "numbers", size, lesson.X.shape[1], 1, seed)
        said = plain.fit(lesson.X[known], lesson.y[known, -1]).predict(lesson.new_x)
    return float(r2_score(lesson.new_y[:, -1], said))


def of_a_front(entry: str, model: Any, lesson: Lesson, size: int, seed: int) -> float:
    """The area that what is drawn dominates, by the true equation."""
    draw = np.random.default_rng(seed)
    low, high = lesson.X.min(0), lesson.X.max(0)
    if model is not None:
        drawn = model.fit(lesson.X, lesson.y).sample(_NUM_DRAWN)
    elif entry == "best rows learned":
        drawn = lesson.X
    else:
        tried = draw.uniform(low, high, (_NUM_TRIED, lesson.X.shape[1]))
        plain = plain_model(entry.split(" of ")[-1], "numbers", size, lesson.X.shape[1], 2, seed)
        said = plain.fit(lesson.X, lesson.y).predict(tried)
        drawn = tried[undominated(said)][:_NUM_DRAWN]
    return hypervolume(costs(drawn, WEIGHTS), _WORST)


def of_the_worst_group(entry: str, model: Any, lesson: Lesson, size: int, seed: int) -> float:
    """The least accuracy of a group, of a linear model that learned the rows drawn."""
    draw, num = np.random.default_rng(seed), 50
    if model is not None:
        rows = model.fit(lesson.X, lesson.y).draw(model.num_rows)
    elif entry == "random rows":
        rows = draw.choice(len(lesson.X), num, replace=False)
    else:
        from sklearn.cluster import KMeans

        from mixtura.methods.estimators import even_draw

        label = KMeans(8, n_init=3, random_state=seed).fit_predict(lesson.X)
        rows = even_draw(label, num, draw)
    plain = plain_model(LINEAR, "classes", 0, lesson.X.shape[1], 2, seed).fit(lesson.X[rows], lesson.y[rows])
    right = plain.predict(lesson.new_x) == lesson.new_y
    group = lesson.more["group"]
    return float(min(right[group == one].mean() for one in np.unique(group)))


def of_pairs(entry: str, model: Any, lesson: Lesson, size: int, seed: int) -> float:
    """The harmonic mean of the accuracies on pairs that were learned and on others, both parts right."""
    if model is not None:
        said = model.fit(lesson.X, lesson.y).predict(lesson.new_x)
    else:
        parts = [
            plain_model(entry, "classes", size // 2, lesson.X.shape[1], len(np.unique(column)), seed)
            .fit(lesson.X, column)
            .predict(lesson.new_x)
            for column in lesson.y.T
        ]
        said = np.stack(parts, axis=1)
    right, unseen = (said == lesson.new_y).all(1), lesson.more["unseen"]
    each = right[unseen].mean(), right[~unseen].mean()
    return float(2 * each[0] * each[1] / max(sum(each), 1e-12))


def of_fields(entry: str, model: Any, lesson: Lesson, size: int, seed: int) -> float:
    """The share of the squared change from the start to the end that is explained."""
    if entry == "state at the start":
        said = lesson.new_x
    else:
        ways: dict[str, dict[str, Any]] = {WHOLE: {"blocks": [1, 1]}, PENALTY: {"hard": False}}
        how = ways.get(entry)
        if how is not None:
            model = create("estimators", "pi_hc_moe", **how, random_state=seed)
        elif model is None:
            model = plain_model(entry, "numbers", size, lesson.X.shape[1], lesson.y.shape[1], seed)
        said = model.fit(lesson.X, lesson.y).predict(lesson.new_x)
    left, changed = said - lesson.new_y, lesson.new_x - lesson.new_y
    return float(1 - np.square(left).sum() / np.square(changed).sum())


Judge = Callable[[str, Any, Lesson, int, int], float]
JUDGES: Final[Mapping[str, Judge]] = {
    "plans": of_the_rare,
    "fronts": of_a_front,
    "draws": of_the_worst_group,
    "pairs": of_pairs,
    "fields": of_fields,
}
