"""The table of recipes: what is published of each model, and what is counted here."""

from __future__ import annotations

from functools import cache

from mixtura.errors import UserError
from mixtura.train.recipes import Recipe, names, recipe


@cache
def counts() -> str:
    """A row a recipe: parameters as published, and as counted on the meta device.

    Raises:
        UserError: a count is more than 2 % from what is published.
    """
    lines = [
        "| recipe | paper | total, published | total, counted | active, published | active, counted |",
        "|---|---|---|---|---|---|",
    ]
    for name in names():
        found = recipe(name)
        total, active = _counted(found)
        wrong = [why for why in (found.misses("total", total), found.misses("active", active)) if why]
        if wrong:
            raise UserError("; ".join(wrong))
        cells = [name, str(found.paper), _said(found.total), _said(total), _said(found.active), _said(active)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sources() -> str:
    """What each recipe's sizes are from."""
    found = [recipe(name) for name in names()]
    return "\n".join(f"- `{one.name}`: *{one.title}*. {one.source.strip()}" for one in found)


def _counted(found: Recipe) -> tuple[int, int | None]:
    from mixtura.modeling.config import MixturaConfig
    from mixtura.modeling.counting import count

    counted = count(MixturaConfig(**found.at("published")["model"]))
    return counted.total, counted.active


def _said(number: float | None) -> str:
    return "–" if number is None else f"{number / 1e9:,.2f} B"
