"""The page of the arena of quantizers: what was run, and a table for each size."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import groupby
from typing import Any

from mixtura.fitting.arena.rounding.entries import REFERENCE
from mixtura.fitting.arena.rounding.standings import Standing
from mixtura.report import counted

_ABOUT = (
    "Written by `mixtura arena quantizers`. The {experts} experts of each of the {layers} layers of {model} "
    "are stored by every quantizer and read back; all else stays as it is. Calibration text is {tokens:,} "
    "tokens of code, prose and tasks, a third each: what the original's experts are given there, weighed by "
    "routing, is what quantizers that heed it go by. What is lost is measured in float32 on other text, "
    "{held_out:,} tokens of each domain at most. {seeds}: each has both texts of its own. Hardware: "
    "{hardware}. {versions}. {day}."
)
_LEGEND = (
    "At each size a quantizer has the settings with most bits, and of these the smallest groups, that take "
    "no more bits a weight than the table says; **bits** is what it takes, scales included. Who has nothing "
    "so small stays out. **KL**: divergence to the original on held-out text, nats a token; **± 95%** of "
    "the mean over seeds. **to {reference}**: the KL over the baseline's with the same text, geometric mean; "
    "**verdict** compares its logarithm with the spread of such logarithms at 5% over all comparisons of a "
    "table together (Holm's correction). **equal top**: positions whose likeliest token is the original's. "
    "**output error**: squared error of the experts' weighted outputs on the calibration text, as a share of "
    "their squares. The baseline, which heeds no calibration, is in italics."
)
_SIZE = (
    "Speed is not measured here: which formats run packed is said on their pages. A model of this size "
    "ranks quantizers for itself; run the command on yours with `--model DIRECTORY`."
)


def markdown(table: Sequence[Standing], facts: Mapping[str, Any], picture: str) -> str:
    """The page."""
    seeds = counted(facts["num_seeds"], "seed")
    texts = ["# The arena: quantizers", _ABOUT.format(**{**facts, **_here(), "seeds": seeds})]
    texts += [_LEGEND.format(reference=REFERENCE), _SIZE, f"![KL against bits]({picture})"]
    for rung, rows in groupby(table, key=lambda one: one.rung):
        texts += [f"## At most {rung:g} bits a weight", _table(list(rows))]
    return "\n\n".join(texts) + "\n"


def _table(rows: Sequence[Standing]) -> str:
    heads = ["", "quantizer", "settings", "bits", "KL", "± 95%", f"to {REFERENCE}", "verdict"]
    heads += ["equal top", "perplexity", "output error"]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    for place, one in enumerate(rows, start=1):
        name = f"*{one.name}*" if one.baseline else f"[`{one.name}`](../methods/quantizers/{one.name}.md)"
        spread = "" if one.half_width is None else f"{one.half_width:.2g}"
        cells = [str(place), name, one.settings, f"{one.bits:.3f}", f"{one.kl:.3g}", spread]
        cells += ["" if one.baseline else f"{one.ratio:.2f}", one.verdict, f"{one.equal_top:.1%}"]
        lines.append(_line([*cells, f"{one.perplexity:.3f}", f"{one.output_error:.3g}"]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _here() -> dict[str, str]:
    import torch
    import transformers

    from mixtura.machine.processor import processor_name

    return {
        "hardware": f"{os.cpu_count()} cores, {processor_name()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "day": date.today().isoformat(),
    }
