"""The page of the arena of aggregators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date

from mixtura.running.composing.policies import PolicyStanding
from mixtura.running.composing.tables import ReplayTable

_ABOUT = (
    "Written by `mixtura arena aggregators`. {about}{prompts:,} prompts, {models} models, {samples} "
    "answers of each to each at most; half of the prompts say which models are preferred, the other "
    "half is measured on. Only methods that ask nothing but the prompt itself can be replayed on a "
    "table. {day}."
)
_LEGEND = (
    "**score**: mean over prompts, with the 95 % bootstrap interval; a prompt without an answer counts "
    "0. **over mix**: that less what single models reach when they are drawn at random so that they "
    "cost the same. **$**: for a thousand prompts. **calls**: for a prompt. An answer's score is that "
    "of the table's rows with the same answer."
)


def markdown(table: Sequence[PolicyStanding], source: ReplayTable, about: str) -> str:
    """The page."""
    pairs: dict[tuple[str, str], int] = {}
    for outcome in source.outcomes:
        at = outcome.prompt, outcome.model
        pairs[at] = pairs.get(at, 0) + 1
    head = _ABOUT.format(
        about=f"{about.strip()} " if about else "",
        prompts=len(source.prompts),
        models=len(source.cards),
        samples=max(pairs.values()),
        day=date.today().isoformat(),
    )
    lines = ["| | score | over mix | $ | calls | no answer | |", "|---|---|---|---|---|---|---|"]
    for one in table:
        cells = [
            f"*{one.name}*" if one.is_model else f"`{one.name}`",
            f"{one.score:.4f} [{one.low:.4f}, {one.high:.4f}]",
            f"{one.over_mix:+.4f} [{one.over_mix_low:+.4f}, {one.over_mix_high:+.4f}]",
            "" if math.isnan(one.cost) else f"{one.cost:.4g}",
            f"{one.calls:.1f}",
            f"{one.abstained:.1%}",
            one.verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n\n".join(["# The arena: aggregators", head, "\n".join(lines), _LEGEND]) + "\n"
