"""Analyses by their names: of traces, of a model at hand, of tables of runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mixtura.data.tokens import TokenBatch
from mixtura.errors import UserError
from mixtura.methods import create, header
from mixtura.methods.analyses import Cell, Evidence, Report
from mixtura.types.trace import Trace

Given = Trace | str | Path
Row = Mapping[str, Cell]
DEFAULT_LOGITS = 4096


def analyze(
    trace: Given | Sequence[Given] | Evidence | None,
    analysis: str,
    *,
    model: Any = None,
    tokens: TokenBatch | None = None,
    tokenizer: Any = None,
    runs: str | Path | Iterable[Row] | None = None,
    steps: Sequence[float] = (),
    **settings: Any,
) -> Report:
    """What an analysis says of a trace, or of the file of one.

    >>> from mixtura.authoring.contracts import sample_trace
    >>> analyze(sample_trace(seed=0, num_experts=4), "load").scalars["dead"]
    0

    Args:
        trace: a trace or its file; for several checkpoints of one training a list of them, the last one
            last; None for an analysis that reads none.
        analysis: its name, or the path of its file.
        model: in memory, for analyses that run it again; it is as before afterwards.
        tokens: the text to run it on, such as that of the trace.
        tokenizer: the model's, to show tokens as text.
        runs: a table of runs, or the file of one (JSON, JSON lines or CSV), for analyses that read one.
        steps: of training, one a trace; by default what the traces say.
        **settings: the analysis's own.

    Raises:
        UnknownNameError: no such analysis.
        SettingError: a setting is unknown or out of range.
        UnsupportedModelError: the analysis steers, and the model cannot be steered.
        UserError: what is given lacks what the analysis needs.
    """
    method = create("analyses", analysis, **settings)
    if isinstance(trace, Evidence):
        found: Report = method.measure(trace)
        return found
    if (model is None) != (tokens is None):
        raise UserError("a model is analysed on a text: give analyze both model and tokens")
    given = [] if trace is None else [trace] if isinstance(trace, Trace | str | Path) else list(trace)
    traces = tuple(one if isinstance(one, Trace) else Trace.load(Path(one)) for one in given)
    evidence = Evidence(traces=traces, steps=tuple(steps) or steps_of(traces), runs=rows_of(runs))
    with ExitStack() as stack:
        study = None
        if model is not None and tokens is not None:
            from mixtura.running.observing.studying import studying

            steers = "steers" in header("analyses", analysis).tags
            study = stack.enter_context(studying(model, tokens, tokenizer, steers=steers))
        known = Evidence(traces=traces, steps=evidence.steps, study=study, runs=evidence.runs)
        report: Report = method.measure(known)
    return report


def steps_of(traces: Sequence[Trace]) -> tuple[float, ...]:
    """The steps that traces say they are of, if all do and they rise; else none."""
    found = [one.step for one in traces]
    if any(step is None for step in found) or len(set(found)) != len(found):
        return ()
    return tuple(float(step) for step in found if step is not None)


def rows_of(runs: str | Path | Iterable[Row] | None) -> tuple[Row, ...]:
    """A table of runs as it is given, or read from a file.

    Raises:
        UserError: the file is missing, or holds no table.
    """
    if runs is None:
        return ()
    if not isinstance(runs, str | Path):
        return tuple(runs)
    path = Path(runs)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a table of runs: {error}") from None
    if path.suffix.lower() == ".csv":
        return tuple(
            {key: _cell(value) for key, value in row.items()} for row in csv.DictReader(text.splitlines())
        )
    try:
        if path.suffix.lower() == ".jsonl":
            made = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            made = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); give a list of objects, JSON lines or CSV") from None
    # The project's own benchmarks keep their rows beside what they were measured on.
    rows = made.get("results", made.get("rows")) if isinstance(made, dict) else made
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} holds no table; give a list of objects, one a run")
    shared: Any = made.get("hardware") if isinstance(made, dict) else None
    machine = _flat(shared, "hardware.")
    return tuple({**machine, **_flat(row)} for row in rows)


def _flat(row: Any, prefix: str = "") -> dict[str, Cell]:
    """An object's numbers and words; those within another by both names."""
    found: dict[str, Cell] = {}
    for name, value in row.items() if isinstance(row, dict) else ():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, str | int | float) or value is None:
            found[f"{prefix}{name}"] = value
    return found


def _cell(text: str | None) -> Cell:
    """A field of a CSV: a number where it is one, nothing where it is empty."""
    if not text:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
