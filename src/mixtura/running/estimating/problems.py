"""What estimators are compared on: scikit-learn's bundled tables, and data drawn by stated equations."""

from __future__ import annotations

import numpy as np

from mixtura.methods.estimators import windows
from mixtura.running.estimating.designs import DESIGNS
from mixtura.running.estimating.lessons import Draw, Lesson, Problem, digits, split
from mixtura.running.estimating.sounds import SOUNDS
from mixtura.running.estimating.worked import WORKED


def rare_digits(draw: Draw) -> Lesson:
    """Digits of which the rarest has a hundredth of the rows of the most frequent, tested on even ones."""
    X, y = digits()
    order = draw.permutation(len(X))
    test, rest = order[:600], order[600:]
    kept = []
    for place, label in enumerate(draw.permutation(10)):
        mine = rest[y[rest] == label]
        kept.append(mine[: max(1, round(100 * 0.01 ** (place / 9)))])
    rows = np.concatenate(kept)
    return Lesson(X[rows], y[rows], X[test], y[test])


def few_digits(draw: Draw) -> Lesson:
    """Ten rows of every digit."""
    X, y = digits()
    order = draw.permutation(len(X))
    rows = np.concatenate([order[y[order] == label][:10] for label in range(10)])
    rest = np.setdiff1d(order, rows)
    return Lesson(X[rows], y[rows], X[rest], y[rest])


def ships(draw: Draw) -> Lesson:
    """Log spectra of four kinds of ship: noise modulated at the shaft's rate, and lines of machinery."""
    rate, num = 128, 800
    time = np.arange(256) / rate
    y = draw.integers(0, 4, num)
    shaft = np.array([3.0, 5.0, 8.0, 12.0])[y] * draw.uniform(0.9, 1.1, num)
    line = np.array([20.0, 26.0, 20.0, 33.0])[y] * draw.uniform(0.97, 1.03, num)
    noise = draw.normal(size=(num, len(time)))
    depth = draw.uniform(0.3, 0.9, (num, 1))
    modulated = noise * (1 + depth * np.cos(2 * np.pi * shaft[:, None] * time))
    tone = 0.4 * np.sin(2 * np.pi * line[:, None] * time + draw.uniform(0, 6, (num, 1)))
    # The envelope's spectrum shows the shaft, the signal's the machinery.
    envelope = np.abs(np.fft.rfft((modulated + tone) ** 2, axis=1))[:, 1:32]
    spectrum = np.abs(np.fft.rfft(modulated + tone, axis=1))[:, 30:80]
    return split(np.log(np.concatenate([envelope, spectrum], axis=1)), y, 500, draw)


def diabetes(draw: Draw) -> Lesson:
    """Progression of diabetes after a year, from ten measurements."""
    from sklearn.datasets import load_diabetes

    X, y = load_diabetes(return_X_y=True)
    return split(X, y, 300, draw)


def photons(draw: Draw) -> Lesson:
    """Counts of photons that scattered to a depth and back, delayed by fluorescence: depth and lifetime."""
    num, time = 800, np.linspace(0.2, 8, 48)
    depth, lifetime = draw.uniform(0.5, 2, num), draw.uniform(0.3, 2, num)
    arrive = time**-1.5 * np.exp(-(depth[:, None] ** 2) / (0.5 * time) - 0.4 * time)
    decay = np.exp(-(time - time[0]) / lifetime[:, None])
    curve = np.stack([np.convolve(a, d)[: len(time)] for a, d in zip(arrive, decay, strict=True)])
    counts = draw.poisson(400 * curve / curve.sum(1, keepdims=True))
    return split(np.sqrt(counts), np.stack([depth, lifetime], axis=1), 500, draw)


def digit_tasks(draw: Draw) -> Lesson:
    """Three questions of a digit: even, above four, and whether it is an eight, which few rows are told."""
    X, digit = digits()
    y = np.stack([digit % 2 == 0, digit > 4, digit == 8], axis=1).astype(float)
    found = split(X, y, 500, draw)
    known = draw.random(500) < 0.2
    # One row of each kind, or there is nothing to learn.
    for kind in (0.0, 1.0):
        known[np.flatnonzero(found.y[:, 2] == kind)[0]] = True
    found.y[~known, 2] = np.nan
    return found


def wave(draw: Draw) -> Lesson:
    """sin(2 pi t / 24) + 0.5 sin(2 pi t / 7) s_t + 0.2 e_t; s_t 0 or 1 by turns of 60, e_t of memory 0.8."""
    num = 900
    time = np.arange(num)
    noise = draw.normal(size=num)
    shaken = noise.copy()
    for t in range(1, num):
        shaken[t] += 0.8 * shaken[t - 1]
    on = (time // 60) % 2
    series = np.sin(2 * np.pi * time / 24) + 0.5 * np.sin(2 * np.pi * time / 7) * on + 0.2 * shaken
    X, y = windows(series, past=32, future=8)
    # Windows of the test begin after the last that learning saw ended.
    return Lesson(X[:550], y[:550], X[590:], y[590:])


def friends(draw: Draw) -> Lesson:
    """Digits with noise, a hundred of 500 with a label; about two of three edges join rows of one digit."""
    X, y = digits()
    rows = draw.permutation(len(X))[:500]
    X, y = X[rows] + 6 * draw.normal(size=(500, 64)), y[rows]
    ends = np.repeat(np.arange(500), 6)
    same = np.array([draw.choice(np.flatnonzero(y == y[end])) for end in ends])
    sources = np.where(draw.random(3000) < 2 / 3, same, draw.integers(0, 500, 3000))
    known = np.where(np.arange(500) < 100, y, -1)
    return Lesson(X, known, X, y, {"edges": np.stack([sources, ends])})


def drift(draw: Draw) -> Lesson:
    """Whether x_1 + x_2 > c, where c is 0.8, 1.2, 0.6, 1.1 for 500 rows each; a tenth of labels is wrong."""
    X = draw.random((2000, 3))
    bound = np.repeat([0.8, 1.2, 0.6, 1.1], 500)
    y = (X[:, 0] + X[:, 1] > bound).astype(int)
    wrong = draw.random(2000) < 0.1
    return Lesson(X, np.where(wrong, 1 - y, y), X, y)


def market(draw: Draw) -> Lesson:
    """Growths of five assets that fall and rise by turns, a regime of each that changes with chance 0.02."""
    regime = np.empty((1000, 5))
    regime[0] = draw.integers(0, 2, 5)
    for day in range(1, 1000):
        regime[day] = np.where(draw.random(5) < 0.02, 1 - regime[day - 1], regime[day - 1])
    growth = np.exp(np.where(regime == 1, 0.002, -0.0015) + 0.015 * draw.normal(size=(1000, 5)))
    return Lesson(growth[:1], np.zeros(1), growth, np.zeros(1000))


_IMAGES = {"patch_moe": {"grid": [8, 8], "side": 4, "patches": 2}}
_SERIES = {"seg_moe": {}, "multi_expert_ldl": {}, "lesa": {"reads": 24}}
# Estimators that no problem here asks for what they do.
NOT_COMPARED = frozenset(
    {"flow_dit", "llmoe", "meta_dmoe", "mm_drex", "moe_embeddings", "scale_zero", "system_family"}
)
PROBLEMS: tuple[Problem, ...] = (
    Problem("rare digits", rare_digits.__doc__ or "", "even accuracy", "classes", {"ride": {}}, rare_digits),
    Problem(
        "few digits",
        few_digits.__doc__ or "",
        "accuracy",
        "classes",
        {"decoupled_mixup": {}, **_IMAGES, "mova": {}},
        few_digits,
    ),
    Problem("ships", ships.__doc__ or "", "accuracy", "classes", {"uatr_cmoe": {}}, ships),
    Problem("diabetes", diabetes.__doc__ or "", "R²", "numbers", {"crmf": {}}, diabetes),
    Problem("photons", photons.__doc__ or "", "R²", "numbers", {"evidence_moe": {}}, photons),
    Problem(
        "digit tasks",
        digit_tasks.__doc__ or "",
        "area of the sparse task",
        "tasks",
        {"home": {"task_groups": [[0, 1], [2]]}, "task_prompted": {}},
        digit_tasks,
    ),
    Problem("wave", wave.__doc__ or "", "R²", "series", _SERIES, wave),
    Problem(
        "friends", friends.__doc__ or "", "accuracy of the rest", "nodes", {"mowst": {}, "gmope": {}}, friends
    ),
    Problem("drift", drift.__doc__ or "", "accuracy before learning", "streams", {"drift_moe": {}}, drift),
    Problem("market", market.__doc__ or "", "log of wealth", "markets", {"universal_portfolio": {}}, market),
    *DESIGNS,
    *SOUNDS,
    *WORKED,
)
