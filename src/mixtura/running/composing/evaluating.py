"""What a fitted router reaches on a table it did not learn from, beside single models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from jaxtyping import Float

from mixtura.errors import UserError
from mixtura.running.composing.fitted import FittedRouter
from mixtura.running.composing.measures import middle, resampled
from mixtura.running.composing.off_policy import off_policy
from mixtura.running.composing.tables import ReplayTable, make_table
from mixtura.types.models import PICO_PER_DOLLAR, Decision, Wish

_NUM_DRAWS: Final = 1000


@final
@dataclass(frozen=True, slots=True)
class Reached:
    """A mean score with its 95 % interval, and dollars for a thousand prompts; None where not known."""

    name: str
    score: float
    low: float
    high: float
    cost: float | None = None

    @property
    def shown_cost(self) -> str:
        """The cost as a table has it."""
        return "" if self.cost is None else f"{self.cost:.4g}"


def evaluate(router: FittedRouter, table: ReplayTable, wish: Wish, seed: int = 0) -> list[Reached]:
    """What the router reaches, first, and what each single model and the best choice would.

    From a log with propensities: what it would have reached, by each estimator.

    Raises:
        UserError: a model of the table that the router does not know, or no prompt can be measured on.
    """
    unknown = sorted(set(table.names) - {card.name for card in router.cards})
    if unknown:
        raise UserError(
            f"the table has {unknown[0]!r}, of which the router learned nothing; it knows "
            f"{', '.join(sorted(router.method.models))}"
        )
    cards = [card for card in router.cards if card.name in table.names]
    # With the router's prices, where the table gives tokens and no costs.
    table = make_table(table.prompts, cards, table.outcomes)
    if any(one.propensity is not None for one in table.outcomes):
        return _logged(router, table, router.decide(table.prompts, wish, seed, cards))
    whole = table.complete()
    if not whole.prompts:
        raise UserError(
            f"no prompt of the table has an answer of every model ({table.num_holes} are missing); fill the "
            "holes, or log with propensities"
        )
    return _measured(whole, router.decide(whole.prompts, wish, seed, cards))


def _measured(table: ReplayTable, made: Sequence[Decision]) -> list[Reached]:
    shares = np.zeros_like(table.scores)
    for row, one in enumerate(made):
        for name, share in one.propensities.items():
            shares[row, table.names.index(name)] = share
    # Where the router abstained and nobody was asked, nothing is reached and nothing spent.
    routed = (shares * table.scores).sum(1), (shares * np.nan_to_num(table.costs)).sum(1)
    weights = resampled(len(table.prompts), _NUM_DRAWS, 0)
    known = not np.isnan(table.costs).any()
    found = [_reached("the router", *routed, weights, known)]
    for place, name in enumerate(table.names):
        found.append(_reached(name, table.scores[:, place], table.costs[:, place], weights, known))
    best = table.scores.argmax(1)
    rows = np.arange(len(best))
    found.append(
        _reached("best in hindsight", table.scores[rows, best], table.costs[rows, best], weights, known)
    )
    return found


def _reached(
    name: str,
    scores: Float[np.ndarray, " P"],
    costs: Float[np.ndarray, " P"],
    weights: Float[np.ndarray, "P D"],
    known: bool,
) -> Reached:
    drawn = scores @ weights
    cost = float(costs.mean()) * 1000 / PICO_PER_DOLLAR if known else None
    return Reached(name, float(drawn[0]), *middle(drawn), cost)


def _logged(router: FittedRouter, table: ReplayTable, made: Sequence[Decision]) -> list[Reached]:
    scores = router.scores(table.prompts)
    expected = {
        (prompt.id, card.name): float(np.nan_to_num(scores.quality[row, place]))
        for row, prompt in enumerate(table.prompts)
        for place, card in enumerate(router.cards)
    }
    judged = [one for one in table.outcomes if one.score is not None]
    found = off_policy(judged, made, expected)
    logged = np.array([float(one.score or 0.0) for one in judged])
    drawn = logged @ resampled(len(judged), _NUM_DRAWS, 0)
    rows = [Reached("the log itself", float(drawn[0]), *middle(drawn))]
    for name, value in found.items():
        size = "∞" if math.isinf(value.effective) else f"{value.effective:.0f}"
        rows.append(Reached(f"the router, by {name} ({size} effective)", value.value, value.low, value.high))
    return rows
