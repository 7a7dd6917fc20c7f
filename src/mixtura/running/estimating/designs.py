"""Problems whose answer is no column of a table: plans, fronts between objectives, draws, compositions."""

from __future__ import annotations

from typing import Final

import numpy as np

from mixtura.running.estimating.lessons import Draw, Lesson, Problem, digits, split

# Blocks of a plan, and plans of which the second measure is known.
NUM_BLOCKS: Final = 12
_FEW: Final = 25
# How much each block minds, the first the most.
WEIGHTS: Final = np.linspace(6, 1, NUM_BLOCKS)


def costs(bits: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The size of plans, and their loss: sum w_b 4^-b + 3 sum 2^-b 2^-b' over neighbours."""
    left = 2.0**-bits
    loss = (weight * left**2).sum(1) + 3 * (left[:, :-1] * left[:, 1:]).sum(1)
    return np.stack([bits.sum(1), loss], axis=1)


def plans(draw: Draw) -> Lesson:
    """Plans of 1 to 4 bits for twelve blocks: 400 with the loss of one model, 25 with that of another.

    The loss is sum w_b 4^-b + 3 sum 2^-b 2^-b' over neighbours; the other model's weights are 0.7 to 1.3
    times as large and its loss is that to the power 1.3.
    """
    other = WEIGHTS * draw.uniform(0.7, 1.3, NUM_BLOCKS)
    bits = draw.integers(1, 5, (800, NUM_BLOCKS)).astype(float)
    y = np.stack([costs(bits, WEIGHTS)[:, 1], costs(bits, other)[:, 1] ** 1.3], axis=1)
    lesson = split(bits, y, 400, draw)
    lesson.y[_FEW:, 1] = np.nan
    return lesson


def frontier(draw: Draw) -> Lesson:
    """Size and loss of 400 such plans, of any number of bits; what counts is the front of 40 drawn."""
    bits = draw.uniform(1, 4, (400, NUM_BLOCKS))
    y = costs(bits, WEIGHTS)
    return Lesson(bits, y, bits[:1], y[:1])


def outcomes(draw: Draw) -> Lesson:
    """Which of two such plans has less loss, by the difference of their bits, with noise as large as it."""
    pairs = draw.uniform(1, 4, (2, 900, NUM_BLOCKS))
    loss = np.stack([costs(one, WEIGHTS)[:, 1] for one in pairs])
    noise = draw.normal(size=900) * (loss[0] - loss[1]).std()
    return split(pairs[0] - pairs[1], (loss[0] + noise < loss[1]).astype(int), 300, draw)


def students(draw: Draw) -> Lesson:
    """Nine skills of 1000 students in groups of 900, 60 and 40, each with a rule for its strategy."""
    sides = []
    for _ in range(2):
        group = np.repeat([0, 1, 2], [900, 60, 40])
        X = 0.5 * draw.random((1000, 9)) + np.kron(np.eye(3), np.ones(3))[group]
        rule = np.stack([X[:, 0] > 1.25, X[:, 3] < 1.25, X[:, 6] > X[:, 7]])
        sides.append((X, rule[group, np.arange(1000)].astype(int)))
    return Lesson(*sides[0], *sides[1], {"group": np.repeat([0, 1, 2], [900, 60, 40])})


_MANNERS = ("plain", "thick", "thin", "inverted", "blurred")


def _made(image: np.ndarray, manner: str) -> np.ndarray:
    from scipy import ndimage

    if manner == "thick":
        image = ndimage.grey_dilation(image, (2, 2))
    elif manner == "thin":
        image = ndimage.grey_erosion(image, (2, 2))
    elif manner == "inverted":
        image = 16 - image
    elif manner == "blurred":
        image = ndimage.gaussian_filter(image, 1.0)
    return image


def compositions(draw: Draw) -> Lesson:
    """Digits, plain, thick, thin, inverted or blurred: 800 of 35 pairs to learn, 15 more to test."""
    X, thing = digits()
    manner = draw.integers(0, len(_MANNERS), len(X))
    made = np.stack([_made(x.reshape(8, 8), _MANNERS[m]).ravel() for x, m in zip(X, manner, strict=True)])
    # Three digits of each manner are left out, in a Latin pattern from a drawn start.
    start = draw.integers(0, 10)
    unseen = (thing - 2 * manner - start) % 10 < 3
    order = draw.permutation(len(X))
    learned, rest = order[~unseen[order]][:800], np.setdiff1d(order, order[~unseen[order]][:800])
    y = np.stack([manner, thing], axis=1)
    return Lesson(made[learned], y[learned], made[rest], y[rest], {"unseen": unseen[rest]})


def cities(draw: Draw) -> Lesson:
    """Rows of three cities, each about its own place, with its own rule; 300, 300 and 30 to learn."""
    sides = []
    for sizes in ((300, 300, 30), (300, 300, 300)):
        city = np.repeat(np.arange(3), sizes)
        rows = draw.normal(size=(len(city), 6))
        y = np.where(city == 2, rows[:, 3] + rows[:, 0] > 0, rows[np.arange(len(city)), city] > 0)
        sides.append((np.column_stack([rows + 2.5 * np.eye(6)[city + 3], city]), y.astype(int)))
    return Lesson(*sides[0], *sides[1])


_NUM_PLACES: Final = 33


def sorbed(start: np.ndarray, horizon: float = 500.0, finer: int = 4) -> np.ndarray:
    """What diffuses along a line whose ground takes some of it in, by lines on a finer mesh.

    u_t = D / R(u) u_xx with u = 1 at the left end and u = D u_x at the right one.
    """
    from scipy.integrate import solve_ivp

    from mixtura.methods.estimators import retardation

    rate = 5e-4
    place = np.linspace(0, 1, (len(start) - 1) * finer + 1)
    step = place[1]

    def whole(inner: np.ndarray) -> np.ndarray:
        right = rate * (inner[-2] - 4 * inner[-1]) / (2 * step - 3 * rate)
        return np.concatenate([[1.0], inner, [right]])

    def change(_: float, inner: np.ndarray) -> np.ndarray:
        speed: np.ndarray = rate / retardation(inner) * np.diff(whole(inner), 2) / step**2
        return speed

    first = np.interp(place, np.linspace(0, 1, len(start)), start)[1:-1]
    done = solve_ivp(change, (0, horizon), first, method="LSODA", lband=1, uband=1, rtol=1e-6, atol=1e-8)
    return whole(done.y[:, -1])[::finer]


def sorption(draw: Draw) -> Lesson:
    """Diffusion with sorption from 64 bumpy states, 48 to learn. Plain models are told what came of them."""
    bumps = np.sin(np.pi * np.outer(np.arange(1, 4), np.linspace(0, 1, _NUM_PLACES)))
    X = 0.1 + 0.4 * draw.random((64, 1)) + 0.12 * np.abs(draw.normal(size=(64, 3)) / [1, 2, 3] @ bumps)
    return split(X, np.stack([sorbed(row) for row in X]), 48, draw)


DESIGNS: tuple[Problem, ...] = (
    Problem(
        "sorption",
        sorption.__doc__ or "",
        "share of the change explained",
        "fields",
        {"pi_hc_moe": {}},
        sorption,
    ),
    Problem(
        "cities",
        cities.__doc__ or "",
        "accuracy",
        "classes",
        {"apollo_moe": {"group_column": 6, "num_experts": 3}},
        cities,
    ),
    Problem("plans", plans.__doc__ or "", "R² of the rare measure", "plans", {"aio_p": {}}, plans),
    Problem("frontier", frontier.__doc__ or "", "hypervolume", "fronts", {"pareto_flow": {}}, frontier),
    Problem(
        "outcomes", outcomes.__doc__ or "", "log likelihood", "classes", {"outcome_forecaster": {}}, outcomes
    ),
    Problem(
        "students",
        students.__doc__ or "",
        "accuracy of the worst group",
        "draws",
        {"mastery_sampler": {"num_rows": 50}},
        students,
    ),
    Problem(
        "compositions",
        compositions.__doc__ or "",
        "harmonic mean of accuracies",
        "pairs",
        {"cot": {"grid": [8, 8]}},
        compositions,
    ),
)
