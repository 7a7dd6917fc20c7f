"""The page and the picture of the arena of upcyclers."""

from __future__ import annotations

from collections.abc import Sequence

from mixtura.fitting.upcycling.arena.models import TOKENS_PER_STEP, Steps
from mixtura.fitting.upcycling.arena.run import MOE, ONE, REFERENCES, SEVERAL
from mixtura.train.arena.paired import Row, difference_cells, name_cell, points
from mixtura.train.arena.plot import scatter

_ABOUT = """\
# The arena: upcyclers

Written by `mixtura arena upcyclers`. A dense model of two layers and width 64 is trained on code, prose and
tasks for {dense} steps of {tokens} tokens; further training on one of the three alone, {special} steps, makes
three specialists of it. Upcyclers make MoE models of the one, or of the three, and all are trained on for
{further} steps with the same text in the same order, at a learning rate that was tuned for none, {seeds}.
Methods that change an MoE model get one of 8 experts, 4 for a token, copies of the dense one's feed-forward
part half of whose neurons were drawn anew, that was trained for {special} steps; two experts are to stay.
{facts}

**start** is the held-out loss in nats a token, a mean over the three kinds of text, of what the method made;
**loss** is that after the further training. The difference is to *{one}*, *{several}* or *{fewer}*, seed by
seed: **better** or **worse** where it is beyond its 95 % interval. The models are far smaller, and trained
far shorter, than any that the methods were made for, and most methods have more parameters than the dense
model. Nothing is corrected for comparing many at once, and two seeds are few. At width 64 the rank of 64
that `flex_more` has by default is whole, so that it is `prompt_gates` here.
"""


def markdown(table: Sequence[Row], num_seeds: int, steps: Steps, facts: str) -> str:
    """The page."""
    about = _ABOUT.format(
        dense=steps.dense,
        special=steps.special,
        further=steps.further,
        tokens=TOKENS_PER_STEP,
        seeds=f"{num_seeds} seeds" if num_seeds > 1 else "one seed",
        facts=facts,
        one=REFERENCES[ONE],
        several=REFERENCES[SEVERAL],
        fewer=REFERENCES[MOE],
    )
    parts = [about]
    for group in (ONE, SEVERAL, MOE):
        rows = [row for row in table if row.group == group]
        if not rows:
            continue
        judged = [row for row in rows if row.verdict != "baseline"]
        better = sum(row.verdict == "better" for row in judged)
        worse = sum(row.verdict == "worse" for row in judged)
        said = (
            f"Of {len(judged)} methods {better} are better than *{REFERENCES[group]}*, {worse} are worse, "
            f"and {len(judged) - better - worse} are not separated from it."
        )
        lines = [
            "| | start | loss | to the reference | ± 95 % | verdict | parameters |",
            "|---|---|---|---|---|---|---|",
            *("| " + " | ".join(_cells(row)) + " |" for row in rows),
        ]
        parts += [f"## Of {group}\n", said + "\n", "\n".join(lines) + "\n"]
    return "\n".join(part if part.endswith("\n") else part + "\n" for part in parts)


def picture(table: Sequence[Row]) -> str:
    """Loss after the further training against that before it."""
    return scatter(
        points(table, "start"),
        title="Upcyclers: held-out loss after further training against that at the start",
        x_label="held-out loss at the start in nats a token",
        y_label="held-out loss after further training",
    )


def _cells(row: Row) -> list[str]:
    numbers = [f"{row.mean('start'):.4f}", f"{row.mean('loss'):.4f}"]
    return [name_cell(row, "upcyclers"), *numbers, *difference_cells(row), f"{row.mean('parameters'):,.0f}"]
