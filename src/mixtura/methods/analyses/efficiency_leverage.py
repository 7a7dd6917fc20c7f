"""How much compute experts save at the same loss, and what that depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import numpy as np
from scipy.optimize import minimize_scalar

from mixtura.errors import UserError
from mixtura.methods.analyses import Analysis, Cell, Evidence, Report
from mixtura.methods.analyses._leverage import COLUMNS, drawn, fit_law, listed
from mixtura.methods.analyses._shared import number_of

METHOD = {
    "paper": 24,
    "title": ("Towards Greater Leverage: Scaling Laws for Efficient Mixture-of-Experts Language Models"),
    "tags": ["needs:runs"],
}
_FEWEST_MOE = 5


def _example() -> tuple[dict[str, Cell], ...]:
    """Runs made by a law of this form: dense ones with an activation of 1, then models with experts."""
    made: list[dict[str, Cell]] = []
    for flops in (1e18, 1e19, 1e20):
        for activation in (1.0, 0.3, 0.1, 0.03):
            for granularity in (2.0, 8.0, 24.0) if activation < 1 else (1.0,):
                x = np.log(granularity)
                power = -0.6 - 0.01 * np.log(flops / 1e18) - 0.16 * x + 0.04 * x * x
                leverage = activation ** (power if activation < 1 else 0.0)
                loss = 60.0 * (flops * leverage) ** -0.07
                values = (flops, float(loss), activation, granularity)
                made.append(dict(zip(COLUMNS, values, strict=True)))
    return tuple(made)


@final
class EfficiencyLeverage(Analysis):
    """Efficiency leverage: the compute a dense model would need over that of a model with experts, as a law.

    A row of the table is a trained model: ``flops`` of its training, ``loss``, ``activation`` (the share of
    its parameters that a token uses, 1 for a dense one) and ``granularity`` (2 D over F). The dense rows give
    loss as a power of compute; each other row's leverage is the dense compute for its loss over its own. Then
    log EL = log A * (a + d log C + b log G + c log^2 G) is fitted by least squares, with A = activation +
    ``floor`` * (1 - activation), which stops falling where ever more experts stop helping, and C in units of
    the least compute there is. ``best_granularity`` is where the leverage is greatest.

    Shapes:
        A table of 2 dense rows and 5 others at least to a law of 5 numbers.

    Raises:
        UserError: a column or rows are missing, or values are not positive.

    Example:
        >>> report = EfficiencyLeverage().measure(Evidence(runs=EfficiencyLeverage.example))
        >>> round(report.scalars["best_granularity"], 2), round(report.scalars["r_squared"], 3)
        (7.39, 1.0)

    Differences from the paper:
        Its constants are not taken over: all are fitted to the table. Its transform of the activation ratio
        was not found, and ``floor`` is ours. The dense law has no irreducible part. Its laws for the learning
        rate and the batch size are left out.

    Reference:
        Towards Greater Leverage: Scaling Laws for Efficient Mixture-of-Experts Language Models (paper 24).
    """

    example: ClassVar[tuple[Mapping[str, Cell], ...]] = _example()

    def measure(self, evidence: Evidence) -> Report:
        runs = evidence.table(*COLUMNS, least=2 + _FEWEST_MOE)
        table = np.array([[number_of(row, name, positive=True) for name in COLUMNS] for row in runs])
        dense, moe = table[table[:, 2] >= 1], table[table[:, 2] < 1]
        if len(np.unique(dense[:, 0])) < 2 or len(moe) < _FEWEST_MOE:
            raise UserError(
                f"the table has {len(dense)} dense rows (activation 1) and {len(moe)} others; at least 2 "
                f"dense ones of different flops and {_FEWEST_MOE} others are needed"
            )
        slope, level = np.polyfit(np.log(dense[:, 0]), np.log(dense[:, 1]), 1)
        if slope >= 0:
            raise UserError(
                "the dense rows' loss does not fall with compute, so that no leverage can be told"
            )
        leverage = np.exp((np.log(moe[:, 1]) - level) / slope) / moe[:, 0]
        unit = table[:, 0].min()
        found = minimize_scalar(
            lambda floor: fit_law(moe, leverage, unit, floor)[1], bounds=(0.0, 0.2), method="bounded"
        )
        floor = float(found.x) if found.fun < fit_law(moe, leverage, unit, 0.0)[1] else 0.0
        law, left, predicted = fit_law(moe, leverage, unit, floor)
        spread = float(((np.log(leverage) - np.log(leverage).mean()) ** 2).sum())
        scalars: dict[str, float | None] = {
            "dense_exponent": float(slope),
            **dict(zip(("a", "d", "b", "c"), law.tolist(), strict=True)),
            "floor": floor,
            "best_granularity": float(np.exp(-law[2] / (2 * law[3]))) if law[3] > 0 else None,
            "greatest": float(leverage.max()),
            "r_squared": 1 - left / spread if spread > 1e-12 else None,
        }
        return Report(scalars, tables=(listed(moe, leverage, predicted),), figures=(drawn(moe, leverage),))
