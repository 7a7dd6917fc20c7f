"""The arena as a whole: every run that is missing, then the page, the table and the picture."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, final

import torch

from mixtura.errors import SettingError, check_range
from mixtura.train.arena.entries import REFERENCE, Entry, entries, plain_layer
from mixtura.train.arena.page import as_csv, markdown
from mixtura.train.arena.plot import Axis, Point, axis_of, scatter
from mixtura.train.arena.race import Notify, Run, perform, result_of
from mixtura.train.arena.scale import Scale
from mixtura.train.arena.standings import Standing, standings
from mixtura.train.arena.text import load_text


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """What is to be run: a kind, names (all where empty), seeds, tokens, and where results are kept."""

    kind: str
    only: tuple[str, ...] = ()
    num_seeds: int = 3
    num_tokens: int = 400_000
    scale: Scale = field(default_factory=Scale)
    runs: Path = Path("build/arena")
    out: Path = Path("docs/arena")

    def __post_init__(self) -> None:
        check_range("the arena", "seeds", self.num_seeds, 1, 1000)
        least = 10 * self.scale.tokens_per_step
        if self.num_tokens < least:
            raise SettingError(f"tokens of the arena must be at least {least:,}, got {self.num_tokens:,}")

    @property
    def num_steps(self) -> int:
        """Steps of the optimizer in each run."""
        return self.num_tokens // self.scale.tokens_per_step


def hold(contest: Contest, notify: Notify) -> list[Standing]:
    """Do the runs that have no result yet, seed by seed, and write page, table and picture.

    A result is kept as soon as it is there; an arena that was stopped goes on where it was.

    Raises:
        UnknownNameError: the kind or a name does not take part.
    """
    taking_part = entries(contest.kind, contest.num_steps, contest.only, contest.scale)
    wanted = [
        Run(kind=contest.kind, entry=entry, seed=seed, num_steps=contest.num_steps, scale=contest.scale)
        for seed in range(contest.num_seeds)
        for entry in taking_part
    ]
    missing = [run for run in wanted if result_of(run, contest.runs) is None]
    text = load_text(contest.scale.sequence_length) if missing else None
    for number, run in enumerate(missing, start=1):
        assert text is not None
        if result_of(run, contest.runs) is not None:
            continue  # another process did it meanwhile
        result = perform(run, text, contest.runs)
        said = result.get("error") or f"{result['bits_per_byte']:.4f} bits per byte"
        notify(
            f"{number}/{len(missing)} {run.entry.name}, seed {run.seed}: {said} ({result['seconds']:.0f} s)"
        )
    return publish(contest, taking_part, wanted)


def publish(contest: Contest, taking_part: Sequence[Entry], runs: Sequence[Run]) -> list[Standing]:
    """Write the page, the table and the picture of the results there are."""
    results = [found for run in runs if (found := result_of(run, contest.runs)) is not None]
    table = standings(results, [entry.name for entry in taking_part if entry.baseline])
    contest.out.mkdir(parents=True, exist_ok=True)
    page = contest.out / f"{contest.kind}.md"
    settings = [line for entry in taking_part if (line := _how(entry, contest.scale))]
    facts = _facts(contest, results, _dates([run.file(contest.runs) for run in runs]))
    page.write_text(markdown(contest.kind, table, facts, f"{contest.kind}.svg", settings), encoding="utf-8")
    page.with_suffix(".csv").write_text(as_csv(table), encoding="utf-8")
    axis = axis_of(contest.kind)
    points = [_point(one, axis) for one in table if not one.error]
    picture = scatter(
        points,
        title=f"{contest.kind}: bits per byte against {axis.what}, {contest.num_seeds} seeds",
        x_label=axis.label,
        y_label="bits per byte of held-out text (lower is better)",
    )
    page.with_suffix(".svg").write_text(picture, encoding="utf-8")
    return table


def _point(one: Standing, axis: Axis) -> Point:
    return Point(
        name=one.name,
        x=one.values[axis.key],
        y=one.values["bits_per_byte"],
        half_height=one.half_width or 0.0,
        group=one.verdict,
        baseline=one.baseline,
        hollow=one.leaks,
    )


def _how(entry: Entry, scale: Scale) -> str:
    """A line on how an entry differs from the plain layer; empty where it does not."""
    moe = dict(entry.model.get("moe", {}))
    chosen = [one for key in ("router", "mixer") if (one := moe.pop(key, None)) is not None]
    if entry.baseline or not moe:
        return ""
    others = {name: value for name, value in entry.model.items() if name != "moe"}
    plain = plain_layer(scale)
    told = {name: value for one in chosen for name, value in one.items() if name != "name"}
    told |= {name: value for name, value in moe.items() if plain.get(name) != value}
    said = ", ".join(f"{name} {_said(value)}" for name, value in (told | others).items())
    return f"- `{entry.name}`: {said or 'its own defaults'}"


def _said(value: Any) -> str:
    """A setting's value as read in a sentence."""
    if isinstance(value, list):
        return " and ".join(map(_said, value)) or "none"
    if isinstance(value, dict) and "name" in value:
        more = ", ".join(f"{name} {one}" for name, one in value.items() if name != "name")
        return f"`{value['name']}`" + (f" ({more})" if more else "")
    return str(value)


def _dates(files: Sequence[Path]) -> str:
    """The days between which runs were finished."""
    days = sorted({date.fromtimestamp(f.stat().st_mtime).isoformat() for f in files if f.exists()})
    return " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "no day"


def _facts(contest: Contest, results: Sequence[Any], dates: str) -> dict[str, Any]:
    import os

    import transformers

    from mixtura.machine.processor import processor_name

    sizes = [one["num_parameters"] for one in results if one["name"] == REFERENCE and "error" not in one]
    return {
        "kind": contest.kind,
        "layers": contest.scale.num_hidden_layers,
        "experts": contest.scale.num_experts,
        "width": contest.scale.d_expert,
        "top_k": contest.scale.top_k,
        "dates": dates,
        "num_seeds": contest.num_seeds,
        "tokens": contest.num_steps * contest.scale.tokens_per_step,
        "parameters": (sizes[0] if sizes else 0) / 1e6,
        "hardware": f"{os.cpu_count()} cores, {processor_name()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }
