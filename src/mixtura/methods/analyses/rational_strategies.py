"""When does a model that learns from context go over from one strategy to another?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, final

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from mixtura.errors import UserError
from mixtura.methods.analyses import Analysis, Cell, Evidence, Lines, Report, Table
from mixtura.methods.analyses._shared import number_of
from mixtura.methods.analyses._strategies import crossing, misfit, odds

METHOD = {
    "paper": 169,
    "title": "In-Context Learning Strategies Emerge Rationally",
    "tags": ["needs:runs"],
}
_COLUMNS = (
    "step",
    "tasks",
    "loss_memorizing",
    "loss_generalizing",
    "complexity_memorizing",
    "complexity_generalizing",
    "distance_memorizing",
    "distance_generalizing",
)
_STARTS = tuple((a, b, c) for a in (0.2, 0.5) for b in (0.2, 0.4) for c in (0.3, 3.0))


def _example() -> tuple[dict[str, Cell], ...]:
    """Trainings on few and many tasks by the law itself: alpha 0.5, beta 0.3, gamma 2."""
    made: list[dict[str, Cell]] = []
    for tasks in (8, 64, 512):
        for step in (10, 100, 1000, 10_000):
            complexity = 40.0 * tasks, 200.0
            odds = 2.0 * step**0.5 * 0.4 - math.log(2) * (complexity[0] ** 0.3 - complexity[1] ** 0.3)
            share = float(expit(odds))
            values = (step, tasks, 1.0, 1.4, *complexity, 1 - share, share)
            made.append(dict(zip(_COLUMNS, values, strict=True)))
    return tuple(made)


@final
class RationalStrategies(Analysis):
    """Strategies of learning in context: memorising seen tasks or generalising, as a rational trade of both.

    A row of the table is a checkpoint: its ``step``, how many ``tasks`` it is trained on, the mean loss and
    the complexity (bits) of two ideal predictors, one that knows the tasks seen and one that knows how tasks
    are drawn, and how far the model's predictions are from those of each. The model's share of memorising is
    the distance to the other predictor over the sum of both. Its law: the log odds are ``gamma`` * step^(1 -
    ``alpha``) times how much less the memorising predictor loses, minus log 2 times how much greater its
    complexity^``beta`` is. The three are fitted by least squares over all rows. A table has the step at which
    each number of tasks goes over, which grows faster than the number of tasks where that is memorised late.

    Shapes:
        A table of 4 rows or more to 3 numbers.

    Raises:
        UserError: a column or rows are missing, or values are no numbers.

    Example:
        >>> report = RationalStrategies().measure(Evidence(runs=RationalStrategies.example))
        >>> [round(report.scalars[name], 2) for name in ("alpha", "beta", "gamma")]
        [0.5, 0.3, 2.0]

    Differences from the paper:
        The two ideal predictors are the user's to compute; the paper's own three families of tasks are not
        built. The fit is to the share of memorising, by the formula of its code, where the paper fits the
        mixed predictions themselves by their divergence. It is about transformers in general, and no property
        of experts.

    Reference:
        In-Context Learning Strategies Emerge Rationally (paper 169); its code, DanielWurgaft/rational-icl at
        7fcd0a6, ``models.py``.
    """

    example: ClassVar[tuple[Mapping[str, Cell], ...]] = _example()

    def measure(self, evidence: Evidence) -> Report:
        runs = evidence.table(*_COLUMNS, least=4)
        data = np.array([[number_of(row, name) for name in _COLUMNS] for row in runs])
        if (data[:, [0, 4, 5]] <= 0).any() or (data[:, 6:].sum(1) <= 0).any():
            raise UserError("step, both complexities and the sum of both distances must be more than 0")
        share = data[:, 7] / data[:, 6:].sum(1)
        best = min(
            (minimize(misfit, np.log(start), args=(data, share), method="L-BFGS-B") for start in _STARTS),
            key=lambda one: float(one.fun),
        )
        alpha, beta, gamma = np.exp(best.x).tolist()
        made = expit(odds(best.x, data))
        spread = float(((share - share.mean()) ** 2).sum())
        rows = []
        for tasks in np.unique(data[:, 1]).tolist():
            part = data[data[:, 1] == tasks]
            rows.append((tasks, crossing(part, alpha, beta, gamma), float(share[data[:, 1] == tasks][-1])))
        scalars: dict[str, float | None] = {
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma,
            "error": float(np.abs(made - share).mean()),
            "r_squared": 1 - float(((made - share) ** 2).sum()) / spread if spread > 1e-12 else None,
        }
        table = Table(
            title="Where memorising takes over",
            columns=("tasks", "step of equal odds", "share at the last step"),
            rows=tuple(rows),
        )
        series = {
            f"{tasks:g} tasks": tuple(map(tuple, np.stack([part[:, 0], part[:, 8]], 1).tolist()))
            for tasks, part in ((t, np.column_stack([data, share])[data[:, 1] == t]) for t, *_ in rows[:6])
        }
        title = "Share of memorising"
        figure = Lines(title=title, x_label="step", y_label="share", series=series, log_x=True)
        return Report(scalars, tables=(table,), figures=(figure,))
