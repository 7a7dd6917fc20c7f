"""What commands share that are given analyses: their names and settings, what they need, what they found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtura.cli._settings import parse_settings
from mixtura.errors import UserError
from mixtura.methods import header

if TYPE_CHECKING:
    from mixtura.checkpoints.skeleton import CheckpointView
    from mixtura.data.tokens import TokenBatch
    from mixtura.methods.analyses import Analysis, Evidence, Report
    from mixtura.running.tiers.opening import Wish
    from mixtura.types.trace import Trace

Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of the analysis, such as segment=16; with one analysis only."),
]
# What a command that observes one model cannot give.
_ONLY_FILES = {
    "series": "compares checkpoints; observe each with --save, and give the traces to 'mixtura analyze'",
    "runs": "reads a table of runs; give it to 'mixtura analyze' by --runs",
}


def tags_of_analyses(names: Sequence[str], *, observing: bool) -> dict[str, list[str]]:
    """What analyses need, by the beginnings of their tags.

    Raises:
        UnknownNameError: there is no such analysis.
        UserError: the command cannot give what one needs: to observe is one model's, to analyse without one.
    """
    found: dict[str, list[str]] = {"statistic": [], "needs": [], "steers": []}
    for name in names:
        for tag in header("analyses", name).tags:
            kind, _, rest = tag.partition(":")
            if kind in found:
                found[kind].append(rest)
            if kind == "needs" and observing and rest in _ONLY_FILES:
                raise UserError(f"{name} {_ONLY_FILES[rest]}")
            if kind == "needs" and not observing and rest == "study":
                raise UserError(f"{name} runs the model again; use 'mixtura observe MODEL --analysis {name}'")
    return found


def made(names: Sequence[str], changes: Sequence[str] | None) -> dict[str, Analysis]:
    """The analyses with their settings, before anything is loaded.

    Raises:
        SettingError: a setting is unknown or out of range.
        UserError: there are settings, and no analysis or several.
    """
    if changes and len(names) != 1:
        raise UserError("--set is for one analysis; name one by --analysis")
    from mixtura.methods import create

    settings = parse_settings(changes or ())
    return {name: create("analyses", name, **settings) for name in names}


def check_room(
    view: CheckpointView, names: Sequence[str], needs: Mapping[str, Sequence[str]], memory: str | None
) -> None:
    """Refuse analyses that run a model again which is larger than the memory that is free.

    Raises:
        UserError: it is, or memory is given for what needs none.
    """
    from mixtura.report.units import format_bytes, parse_bytes

    if "study" not in needs["needs"]:
        if memory is not None:
            raise UserError(
                "--memory is for analyses that run the model again (needs:study in mixtura show NAME), and "
                "none is asked for; observing alone reads the model layer by layer, so leave it out"
            )
        return
    if memory is not None:
        parse_bytes(memory)
        return
    from mixtura.running.memory.available import available_bytes

    free = available_bytes()
    if view.num_bytes > free:
        raise UserError(
            f"{', '.join(names)}: one of these runs the model again and needs it in memory, which takes "
            f"{format_bytes(view.num_bytes)} of {format_bytes(free)} that are free; give --memory "
            f"{format_bytes(int(0.8 * free)).replace(' ', '')} to have experts read from disk, or choose "
            "analyses of a trace"
        )


@contextmanager
def evidence_of(
    view: CheckpointView,
    trace: Trace,
    tokens: TokenBatch,
    needs: Mapping[str, Sequence[str]],
    memory: str | None,
) -> Iterator[Evidence]:
    """What was observed, and the model itself where an analysis runs it again."""
    from mixtura.methods.analyses import Evidence

    if "study" not in needs["needs"]:
        yield Evidence.of(trace)
        return
    from mixtura.checkpoints.tokenizer import load_tokenizer
    from mixtura.running.loading import load
    from mixtura.running.observing.studying import studying

    tokenizer: Any = load_tokenizer(view.path)
    model = load(view.path, memory=None if memory is None else _wish(view, tokens, memory))
    with studying(model, tokens, tokenizer, steers=bool(needs["steers"])) as study:
        yield Evidence(traces=(trace,), study=study)


def _wish(view: CheckpointView, tokens: TokenBatch, memory: str) -> Wish:
    """Memory for a model that reads several rows of text in one pass, and for their logits."""
    from mixtura.data.tokens import num_embeddings_of
    from mixtura.methods.analyses import ROWS_AT_ONCE
    from mixtura.running.tiers.opening import Wish

    length = tokens.input_ids.shape[1]
    logits = 4 * ROWS_AT_ONCE * length * (num_embeddings_of(view.config) or 0)
    return Wish(memory=memory, context=length, more_bytes=logits)


def print_reports(reports: Mapping[str, Report]) -> None:
    """Show what analyses found: sentences, numbers, rows by layer, tables."""
    from mixtura.report.screen import screen, show_table
    from mixtura.running.observing.findings import shown

    console = screen()
    for name, one in reports.items():
        whole = ", ".join(f"{key} {shown(value)}" for key, value in one.scalars.items())
        console.print()
        for sentence in one.sentences:
            console.print(sentence, markup=False)
        if one.rows:
            rows = [[shown(row[column]) for column in one.columns] for row in one.rows]
            show_table(console, list(one.columns), rows, title=f"{name}: {whole}")
        else:
            console.print(f"{name}: {whole}", style="bold", markup=False)
        for table in one.tables:
            console.print()
            cells = [[shown(value) for value in row] for row in table.rows]
            words = [
                place
                for place in range(len(table.columns))
                if any(isinstance(row[place], str) for row in table.rows)
            ]
            show_table(console, list(table.columns), cells, title=table.title, left=words)
