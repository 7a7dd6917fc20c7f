"""How good routing is: curves of quality over cost, their areas, and what they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from jaxtyping import Float, Int

from mixtura.methods.model_routers import ranking
from mixtura.types.models import PICO_PER_DOLLAR, ModelCard, Scores, Wish

_NUM_PRICES: Final = 40


@final
@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Which model each prompt goes to, for ever greater prices of a dollar.

    Attributes:
        choices: by price and prompt, the column of the model.
    """

    choices: Int[np.ndarray, "N P"]

    def per_prompt(
        self, scores: Float[np.ndarray, "P M"], costs: Float[np.ndarray, "P M"]
    ) -> tuple[Float[np.ndarray, "N P"], Float[np.ndarray, "N P"]]:
        """True cost and true score of each prompt, by price."""
        rows = np.arange(self.choices.shape[1])
        return costs[rows, self.choices], scores[rows, self.choices]


def curve(expected: Scores, cards: Sequence[ModelCard]) -> Curve:
    """The choices of a router from "whatever it costs" to "as cheap as can be".

    Prices are those at which something can change for these expectations; true scores are not looked at.
    """
    eligible = np.ones(expected.quality.shape, dtype=bool)
    spread = np.nanmax(expected.cost, initial=0.0) - np.nanmin(expected.cost, initial=np.inf)
    base = PICO_PER_DOLLAR / spread if np.isfinite(spread) and spread > 0 else 0.0
    prices = [0.0, *(base * np.geomspace(1e-3, 1e4, _NUM_PRICES) if base else [])]
    made = [
        ranking(expected, Wish(quality_per_dollar=float(price)), eligible, cards)[:, 0] for price in prices
    ]
    return Curve(np.stack(made))


def area(cost: Float[np.ndarray, " N"], quality: Float[np.ndarray, " N"], low: float, high: float) -> float:
    """Mean quality over budgets from ``low`` to ``high``, mixing two neighbouring points for one between.

    Money that a curve has no use for is not spent: beyond its dearest point its quality stays.

    Args:
        cost: of the points; the cheapest should cost no more than ``low``, or its quality is taken for that
            of all budgets below.
        quality: of the points.
        low: the least budget.
        high: the greatest, above ``low``.

    >>> area(np.array([0.0, 1.0]), np.array([0.0, 1.0]), 0.0, 1.0)
    0.5
    """
    order = np.lexsort((quality, cost))
    at, value = cost[order], quality[order]
    inner = at[(at > low) & (at < high)]
    grid = np.concatenate([[low], inner, [high]])
    heights = np.interp(grid, at, value)
    return float(np.trapezoid(heights, grid) / (high - low))


def hull(cost: Float[np.ndarray, " M"], quality: Float[np.ndarray, " M"]) -> list[int]:
    """Models on the upper convex hull of quality over cost, from the cheapest to the best.

    >>> hull(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.2, 0.3, 0.8, 0.7]))
    [0, 2]
    """
    best: list[int] = []
    for place in np.lexsort((-quality, cost)):
        if best and quality[place] <= quality[best[-1]]:
            continue
        while len(best) > 1 and _turns_up(cost, quality, best[-2], best[-1], int(place)):
            best.pop()
        best.append(int(place))
    return best


def _turns_up(cost: np.ndarray, quality: np.ndarray, a: int, b: int, c: int) -> bool:
    rise, run = quality[b] - quality[a], cost[b] - cost[a]
    further, width = quality[c] - quality[a], cost[c] - cost[a]
    return bool(rise * width <= further * run)


def resampled(num_prompts: int, num_draws: int, seed: int) -> Float[np.ndarray, "P D"]:
    """Weights of prompts: first each alike, then as often as they are drawn with replacement."""
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_draws).T
    return np.concatenate([np.ones((num_prompts, 1)), drawn], axis=1) / num_prompts


def middle(values: Float[np.ndarray, " D"]) -> tuple[float, float]:
    """The ends of the 95 % bootstrap interval: of all draws but the first, which is the estimate."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return float(low), float(high)
