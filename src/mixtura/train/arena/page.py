"""The page of a kind: what was run, how each entry was set, the plot and the table; all numbers as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mixtura.train.arena.plot import axis_of
from mixtura.train.arena.standings import MEANS, Standing

_COLUMNS = (
    ("bits/byte", "bits_per_byte", ".4f"),
    ("experts a token", "experts_per_token", ".2f"),
    ("fullest / mean", "max_over_mean", ".2f"),
    ("dead", "dead_experts", ".1f"),
    ("fluctuation", "fluctuation", ".2f"),
    ("specialisation", "specialisation", ".2f"),
    ("more µs a token", "overhead_us", "+.1f"),
    ("time / top-k", "time_ratio", ".2f"),
    ("parameters", "num_parameters", ",.0f"),
)


def markdown(
    kind: str, table: Sequence[Standing], facts: Mapping[str, Any], plot: str, settings: Sequence[str] = ()
) -> str:
    """The page of a kind: what was run, the plot and the table."""
    heads = ["", "method", *(title for title, _, _ in _COLUMNS[:1]), "± 95%", "to top-k", "verdict"]
    heads += [title for title, _, _ in _COLUMNS[1:]]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    trained = [one for one in table if not one.error]
    for place, one in enumerate(trained, start=1):
        cells = [_cell(one.values.get(key), form) for _, key, form in _COLUMNS]
        between = [_cell(one.half_width, ".4f"), _cell(one.difference, "+.4f"), one.verdict]
        lines.append("| " + " | ".join([str(place), _marked(one), cells[0], *between, *cells[1:]]) + " |")
    missing = [f"- {one.name}: {one.error}" for one in table if one.error]
    methods = [one for one in trained if not one.baseline]
    counts = {word: sum(one.verdict == word for one in methods) for word in _VERDICTS}
    summary = (
        f"{len(methods)} methods and {len(trained) - len(methods)} baselines, {facts['num_seeds']} seeds "
        "each. Of the methods, " + ", ".join(f"{count} {word}" for word, count in counts.items()) + "."
    )
    picture = f"![Bits per byte against {axis_of(kind).what}]({plot})"
    about = _ABOUT.format(**facts)
    texts = [f"# The arena: {kind}", about, _PROVENANCE, summary, picture, "\n".join(lines), _LEGEND]
    if missing:
        texts.append("## Not trained\n\n" + "\n".join(missing))
    if settings:
        told = _SET.format(**facts, notes=_NOTES.get(kind, "")).rstrip()
        texts.append("## How each was set\n\n" + told + "\n\n" + "\n".join(settings))
    return "\n\n".join(texts) + "\n"


_VERDICTS = ("better", "worse", "not separated", "not comparable")
_ABOUT = (
    "Written by `mixtura arena {kind}`. The same model of {parameters:.2f}M parameters ({layers} layers, "
    "{experts} experts of width {width}, {top_k} experts a token where the method can be set so) was trained "
    "with every method on {tokens:,} tokens of the specimen's text, the same ones in the same order for "
    "every method of a seed, and measured on held-out text: code, prose and tasks, a third each. Numbers "
    "of so short a training rank methods at this size only. Hardware: {hardware}. {versions}. Runs of "
    "{dates}."
)
_PROVENANCE = (
    "Learning rate, batch, depth and the number of experts of the small model were chosen beforehand by "
    "trying `top_k`, `hash` and the dense baselines with one seed, until `top_k` was no longer behind a "
    "dense model of the same active size: with twice as many experts of half the width it is, since each "
    "then sees too few tokens. Settings of the methods were not tuned."
)
_SET = (
    "What differs from a method's own defaults, and from {experts} experts of width {width} with "
    "`switch_loss` (coefficient 0.01) beside the router. Methods that send a token to one expert have fewer, "
    "as much wider. {notes}"
)
_NOTES = {
    "experts": (
        "Sizes are such that a token takes as many multiplications as with plain experts, its router aside. "
        "Experts on a grid have no number of experts a token, and their loads are those of rows and columns."
    ),
    "forms": (
        "Sizes are such that a token takes as many multiplications as with a plain layer, routers aside; "
        "with several passes loads are those of each."
    ),
    "attentions": (
        "Projections of a token take as many multiplications as plain attention's, as far as whole heads "
        "allow; products of queries and keys are fewer. Loads are those of experts, not of heads."
    ),
    "routers": (
        "`mixer_gate` is not refitted here, since nothing tells the loss of a context under each expert: its "
        "gate stays as drawn."
    ),
}
_LEGEND = (
    "**bits/byte**: of held-out text, the mean of three domains. **± 95%**: half the interval of the mean "
    "over this entry's own seeds. **to top-k**: the mean difference to top-k with the same seeds; "
    "**verdict** compares it with the spread of such differences, pooled over all entries, at 5% over all "
    "comparisons together (Holm's correction). **fullest / mean**: load of the fullest expert over the "
    "mean, worst layer. **dead**: experts of a layer without a token. **fluctuation**: share of assignments "
    "that changed between checkpoints. **specialisation**: share of assignments that would have to move for "
    "two domains to use experts alike. **more µs a token** and **time / top-k**: a forward pass on one "
    "thread beside plain top-k's. **parameters**: of the whole model, embeddings included. An asterisk marks "
    "methods whose routing looks ahead in evaluation: their bits per byte are *leaking* later tokens and do "
    "not compare. Baselines are in italics."
)


def _marked(one: Standing) -> str:
    name = f"*{one.name}*" if one.baseline else f"`{one.name}`"
    return name + (" \\*" if one.leaks else "")


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def as_csv(table: Sequence[Standing]) -> str:
    """The table with every number, for other programs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    fixed = ("name", "num_seeds", "baseline", "leaks", "verdict", "difference", "p_value", "half_width")
    writer.writerow([*fixed, *MEANS, "error"])
    for one in table:
        values = [getattr(one, name) for name in fixed]
        means = [one.values.get(name) for name in MEANS]
        writer.writerow(["" if v is None else v for v in [*values, *means, one.error]])
    return out.getvalue()
