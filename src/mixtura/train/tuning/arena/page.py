"""The page and the picture of the arena of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mixtura.train.arena.paired import Row, difference_cells, name_cell, points
from mixtura.train.arena.plot import scatter
from mixtura.train.tuning.arena.rows import FULL, NONE, REFERENCE, TRAINED
from mixtura.train.tuning.arena.run import NEW, TOKENS_PER_STEP

_ABOUT = """\
# The arena: adapters

Written by `mixtura arena adapters`. The specimen, an MoE model of 21 million parameters, is tuned on two
kinds of tasks that it mostly fails ({kinds}) with every adapter, on the same records in the same order:
{steps} steps of {tokens} tokens, AdamW, {seeds}. Ranks are chosen so that each trains about {trained:,}
parameters, alpha is twice the rank, and all else is as the method has it. The learning rate is 2e-3 for all
but what trains matrices of the base in full size, which have 2e-4; no other was tried. {facts}

**loss** is that of held-out answers of the new kinds in nats a token, **others** that of the other kinds,
which shows what is forgotten. The difference is to *{reference}* (`target_parameters`), seed by seed:
**better** or **worse** where it is beyond its 95 % interval, which one seed has not. Time is the processor's,
on a machine that others used. Nothing is corrected for comparing many at once, and two seeds are few.

Of {judged} adapters {better} are better than *{reference}*, {worse} are worse, and {same} are not separated
from it.
"""


def markdown(
    table: Sequence[Row], absent: Mapping[str, str], num_seeds: int, num_steps: int, facts: str
) -> str:
    """The page."""
    judged = [row for row in table if row.verdict != "baseline"]
    counts = {verdict: sum(row.verdict == verdict for row in judged) for verdict in _VERDICTS}
    about = _ABOUT.format(
        kinds=" and ".join(NEW),
        steps=num_steps,
        tokens=TOKENS_PER_STEP,
        seeds=f"{num_seeds} seeds" if num_seeds > 1 else "one seed",
        trained=TRAINED,
        facts=facts,
        reference=REFERENCE,
        judged=len(judged),
        better=counts["better"],
        worse=counts["worse"],
        same=counts["not separated"],
    )
    lines = [
        "| | loss | others | to the reference | ± 95 % | verdict | trained | CPU s a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in table]
    parts = [about, "\n".join(lines)]
    if absent:
        parts.append("Who does not take part, and why:")
        parts.append("\n".join(f"- `{name}`: {reason}" for name, reason in absent.items()))
    return "\n".join(f"{part.rstrip()}\n" for part in parts)


def picture(table: Sequence[Row]) -> str:
    """Loss against the processor time of a step."""
    return scatter(
        points([row for row in table if row.name != NONE], "seconds_per_step"),
        title="Adapters: held-out loss against time",
        x_label="processor seconds a step",
        y_label="held-out loss in nats a token",
    )


_VERDICTS = ("better", "worse", "not separated")


def _cells(row: Row) -> list[str]:
    time = "–" if row.name == NONE else f"{row.mean('seconds_per_step'):.2f}"
    trained = f"{row.mean('trained'):,.0f}" if row.name != FULL else f"{row.mean('trained'):,.0f} (all)"
    losses = [f"{row.mean('loss'):.4f}", f"{row.mean('others'):.4f}"]
    return [name_cell(row, "adapters"), *losses, *difference_cells(row), trained, time]
