"""The page of the arena of model routers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date

from mixtura.running.composing.arena import BLIND, BOUND, HULL, Standing
from mixtura.running.composing.tables import ReplayTable

_ABOUT = (
    "Written by `mixtura arena model_routers`. {about}{prompts:,} prompts, {models} models ({names}), "
    "{holes:,} answers missing; {splits}: half of the prompts are learned from, the other half measured "
    "on. Every method has its default settings and the same embedding (hashed words). {day}."
)
_LEGEND = (
    "**area**: mean score over budgets from the cheapest to the dearest single model, as the price of a "
    "dollar rises; in brackets the 95 % bootstrap interval over prompts. **over hull**: that less "
    "`zero_hull`, the convex hull of single models on the prompts that were learned from, mixed at "
    "random, which reads no prompt: what a router adds by reading prompts. **quality**: mean score "
    "where cost does not matter, and less that of the best single model. **$**: for a thousand prompts "
    "there. **calibration**: mean difference between expected and true score. `random_at_equal_cost` "
    "draws between the two ends of the hull. `oracle` knows every outcome, lucky guesses among them."
)
_COSTLESS = "The table has no costs: the area is the quality where cost does not matter."


def markdown(table: Sequence[Standing], source: ReplayTable, num_splits: int, about: str) -> str:
    """The page."""
    splits = "one split" if num_splits == 1 else f"{num_splits} splits"
    head = _ABOUT.format(
        about=f"{about.strip()} " if about else "",
        prompts=len(source.prompts),
        models=len(source.cards),
        names=", ".join(source.names),
        holes=source.num_holes,
        splits=splits,
        day=date.today().isoformat(),
    )
    costless = [] if any(one.cost > 0 for one in table) else [_COSTLESS]
    parts = ["# The arena: model routers", head, *costless, _rows(table), _beaten(table), _LEGEND]
    return "\n\n".join(parts) + "\n"


def _rows(table: Sequence[Standing]) -> str:
    lines = [
        "|  | router | area | over hull | quality | over best single | $ | calibration | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    place = 0
    for one in table:
        plain = one.name in (HULL, BLIND, BOUND)
        place += not plain
        cells = [
            "" if plain else str(place),
            f"*{one.name}*" if plain else f"`{one.name}`",
            f"{one.area:.4f} [{one.area_low:.4f}, {one.area_high:.4f}]",
            f"{one.over_hull:+.4f} [{one.over_hull_low:+.4f}, {one.over_hull_high:+.4f}]",
            f"{one.quality:.4f}",
            f"{one.over_best:+.4f} [{one.over_best_low:+.4f}, {one.over_best_high:+.4f}]",
            f"{one.cost:.4g}",
            "" if math.isnan(one.calibration) else f"{one.calibration:.3f}",
            one.verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _beaten(table: Sequence[Standing]) -> str:
    """What the numbers come to, in a sentence."""
    raced = [one for one in table if one.verdict not in ("trivial", "knows the outcomes: a bound")]
    won = [f"`{one.name}`" for one in raced if one.over_hull_low > 0]
    lost = [f"`{one.name}`" for one in raced if one.over_hull_low <= 0]
    said = f"Better than single models mixed without reading a prompt: {', '.join(won) or 'none'}."
    return said + (f" Not better: {', '.join(lost)}." if lost else "")
