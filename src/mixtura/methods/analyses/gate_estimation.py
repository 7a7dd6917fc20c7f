"""How much data a gate with a temperature takes to be estimated."""

from __future__ import annotations

from typing import final

import numpy as np

from mixtura.errors import check_range
from mixtura.methods.analyses import Analysis, Evidence, Lines, Report, Table
from mixtura.methods.analyses._gaussian import Gate, error_of_fit
from mixtura.methods.analyses._shared import generator_of

METHOD = {
    "paper": 183,
    "title": "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?",
    "tags": ["simulates"],
}
_GATES: tuple[Gate, ...] = ("temperature", "activation")


@final
class GateEstimation(Analysis):
    """Sample efficiency of a temperature in the gate: with it, is a gate learnt as data grow?

    Points are drawn of a mixture of two linear experts with normal errors, for each of ``sizes`` so many, and
    a mixture of the same form is fitted by maximum likelihood, ``repeats`` times. A softmax of linear logits
    over a temperature cannot tell the temperature from the logits' size, and its error stays; with an
    activation between logits and temperature it falls about as one over the root of the number of points.
    ``slope_...`` is the slope of log error over log size: -1/2 is the parametric rate, 0 is no learning.
    ``experts_...`` is the same for the experts' own parameters, which are learnt either way.

    Shapes:
        Nothing to a table of sizes.

    Raises:
        SettingError: a setting is out of range.

    Example:
        >>> report = GateEstimation().measure(Evidence())
        >>> report.scalars["slope_activation"] < -0.25 < report.scalars["slope_temperature"]
        True

    Differences from the paper:
        The number of experts is known, of one feature each, and fits begin beside the truth, so that its
        slowest rates, of more experts than there are, are not seen. The error is a norm of differences of
        matched parameters instead of its loss over Voronoi cells. Logits have a quadratic part.

    Reference:
        Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts? (paper 183).
    """

    def __init__(
        self,
        *,
        sizes: list[int] = [200, 800, 3200],  # noqa: B006 - never changed
        repeats: int = 3,
        seed: int = 0,
    ) -> None:
        check_range("GateEstimation", "repeats", repeats, 1, 10_000)
        check_range("GateEstimation", "the number of sizes", len(set(sizes)), 2, 100)
        for size in sizes:
            check_range("GateEstimation", "sizes", size, 20, 1 << 24)
        self.sizes = sorted(set(sizes))
        self.repeats = repeats
        self.seed = seed

    def measure(self, evidence: Evidence) -> Report:
        del evidence
        errors: dict[str, list[float]] = {}
        for gate in _GATES:
            generator = generator_of(self.seed)
            for size in self.sizes:
                made = np.array([error_of_fit(size, gate, generator) for _ in range(self.repeats)])
                for what, value in zip(("slope", "experts"), np.median(made, axis=0).tolist(), strict=True):
                    errors.setdefault(f"{what}_{gate}", []).append(value)
        logs = np.log(self.sizes)
        scalars: dict[str, float | None] = {
            name: float(np.polyfit(logs, np.log(np.maximum(found, 1e-300)), 1)[0])
            for name, found in errors.items()
        }
        rows = tuple(
            (size, *(errors[name][place] for name in errors)) for place, size in enumerate(self.sizes)
        )
        names = {f"slope_{gate}": f"gate with {gate}" for gate in _GATES}
        names |= {f"experts_{gate}": f"experts with {gate}" for gate in _GATES}
        table = Table(title="Median error", columns=("points", *(names[one] for one in errors)), rows=rows)
        series = {
            names[name]: tuple((float(a), b) for a, b in zip(self.sizes, found, strict=True))
            for name, found in errors.items()
        }
        figure = Lines(
            title="Error of the fit", x_label="points", y_label="error", series=series, log_x=True, log_y=True
        )
        return Report(scalars, tables=(table,), figures=(figure,))
