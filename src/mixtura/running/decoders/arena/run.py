"""Holding the arena of decoders: measure, compare in pairs, write the page."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import Any, final

import torch

from mixtura.data import specimen
from mixtura.running.decoders.arena.entries import ABSENT, REFERENCE, Entry, entries
from mixtura.running.decoders.arena.exam import Exam, Notify
from mixtura.running.resolve import resolve_model

_SURE = 0.05


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """What is measured: entries, seeds (each has questions of its own), questions of each task."""

    only: tuple[str, ...] = ()
    num_seeds: int = 3
    num_per_task: int = 16
    model: Path | None = None
    runs: Path
    out: Path


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """An entry over all seeds.

    Attributes:
        name: of the entry.
        accuracy: share of questions answered right, and by seed.
        gained: questions right that greedy decoding has wrong, and the other way round.
        p_value: of the sign test on these, two-sided.
        best_possible: share of questions that some branch has right.
        answer_tokens, passes, tokens, assignments, layer_passes: for a question, on average.
        seconds: in all.
    """

    name: str
    accuracy: float
    by_seed: tuple[float, ...]
    gained: int
    lost: int
    p_value: float
    best_possible: float
    answer_tokens: float
    passes: float
    tokens: float
    assignments: float
    layer_passes: float
    seconds: float
    told: bool
    by_task: dict[str, float]

    @property
    def verdict(self) -> str:
        """What the pairs say."""
        if self.p_value >= _SURE:
            return "no difference seen"
        return "better" if self.gained > self.lost else "worse"


def hold(contest: Contest, notify: Notify) -> list[Standing]:
    """Measure every entry on every seed's questions, and write table and page."""
    path = specimen.path() if contest.model is None else contest.model
    exam = Exam(path, contest.runs, contest.num_per_task, notify)
    taking_part = entries(contest.only)
    results = {
        entry.name: [exam.result(entry, seed) for seed in range(contest.num_seeds)] for entry in taking_part
    }
    table = [standing(entry, results[entry.name], results[REFERENCE]) for entry in taking_part]
    contest.out.mkdir(parents=True, exist_ok=True)
    name = resolve_model(None if contest.model is None else str(contest.model)).name
    text = page(table, contest, name)
    (contest.out / "decoders.md").write_text(text, encoding="utf-8")
    rows = json.dumps([asdict(one) for one in table], indent=1) + "\n"
    (contest.out / "decoders.json").write_text(rows, encoding="utf-8")
    return table


def standing(
    entry: Entry, results: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]
) -> Standing:
    """An entry's numbers over its seeds' results, in pairs with the reference's on the same questions."""
    rows = [row for result in results for row in result["rows"]]
    others = [row for result in reference for row in result["rows"]]
    gained = sum(row["right"] and not other["right"] for row, other in zip(rows, others, strict=True))
    lost = sum(other["right"] and not row["right"] for row, other in zip(rows, others, strict=True))
    number = len(rows)
    cost = {name: sum(result["cost"][name] for result in results) / number for name in results[0]["cost"]}
    tasks = sorted({row["task"] for row in rows})
    return Standing(
        name=entry.name,
        accuracy=sum(row["right"] for row in rows) / number,
        by_seed=tuple(_share(result["rows"]) for result in results),
        gained=gained,
        lost=lost,
        p_value=sign_test(gained, lost),
        best_possible=sum(row["any_right"] for row in rows) / number,
        answer_tokens=sum(row["answer_tokens"] for row in rows) / number,
        passes=cost["num_passes"],
        tokens=cost["num_tokens"],
        assignments=cost["num_assignments"],
        layer_passes=cost["layer_passes"],
        seconds=sum(result["seconds"] for result in results),
        told=entry.bound,
        by_task={task: _share([row for row in rows if row["task"] == task]) for task in tasks},
    )


def sign_test(gained: int, lost: int) -> float:
    """The chance of pairs at least as one-sided as these, both sides being equally likely.

    >>> sign_test(0, 0), sign_test(5, 0), sign_test(3, 1)
    (1.0, 0.0625, 0.625)
    """
    number, most = gained + lost, max(gained, lost)
    tail = sum(comb(number, k) for k in range(most, number + 1)) / 2.0**number
    return float(min(1.0, 2 * tail))


def _share(rows: Sequence[dict[str, Any]]) -> float:
    return float(sum(row["right"] for row in rows) / len(rows))


_HEADER = (
    "decoder", "right", "by seed", "gained, lost", "p", "verdict", "best possible", "tokens run", "answer",
    "experts run", "passes",
)  # fmt: skip
_EXPLAINED = """\
An entry is compared with greedy decoding question by question: those it has right and greedy wrong
(gained), the other way round (lost), and a two-sided sign test on these. "Best possible" is the share of
questions that some branch has right, whichever was chosen. Entries marked (told), and those of a fixed
number of experts, are given a verifier that knows the right solution line by line; with one branch it
decides nothing, with several it is a bound that no user has. Tokens are all that ran for a question, its
prompt and every branch and view among them; passes are those of a batch of 24 questions, divided by its
questions."""


def page(table: Sequence[Standing], contest: Contest, model: str) -> str:
    """The page of a contest."""
    lines = [
        "# Decoders compared",
        "",
        f"Written by `mixtura arena decoders`: {model} answers the same held-out questions by every decoder,",
        f"{contest.num_per_task} of each task and seed, {contest.num_seeds} seeds, float32, in batches.",
        f"torch {torch.__version__}, {platform.machine()}, one process.",
        "",
        _EXPLAINED,
        "",
        f"| {' | '.join(_HEADER)} |",
        "|---" * len(_HEADER) + "|",
    ]
    for one in table:
        seeds = ", ".join(f"{share:.0%}" for share in one.by_seed)
        lines.append(
            f"| {one.name} | {one.accuracy:.1%} | {seeds} | {one.gained}, {one.lost} | {one.p_value:.3f} | "
            f"{one.verdict if one.name != REFERENCE else 'reference'} | {one.best_possible:.1%} | "
            f"{one.tokens:.0f} | {one.answer_tokens:.0f} | "
            f"{f'{one.assignments:.0f}' if one.assignments else 'as routed'} | {one.passes:.1f} |"
        )
    tasks = list(table[0].by_task)
    lines += ["", "## By task", "", f"| decoder | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for one in table:
        lines.append(f"| {one.name} | {' | '.join(f'{one.by_task[task]:.0%}' for task in tasks)} |")
    lines += ["", "## What follows", "", *findings(table), ""]
    lines += ["## Who does not take part", "", *(f"- `{name}`: {why}." for name, why in ABSENT.items()), ""]
    return "\n".join(lines)


def findings(table: Sequence[Standing]) -> list[str]:
    """What the numbers say, in words; nothing that they do not."""
    asked = [one for one in table if one.name != REFERENCE and not one.told]
    better = [one.name for one in asked if one.verdict == "better"]
    worse = [one.name for one in asked if one.verdict == "worse"]
    alike = [one.name for one in asked if one.verdict == "no difference seen"]
    told = [one for one in table if one.told]
    plain = next(one for one in table if one.name == REFERENCE)
    open_tasks = [task for task, share in plain.by_task.items() if 0 < share < 1]
    least = next(number for number in range(1, 100) if sign_test(number, 0) < _SURE)
    lines = [
        f"- Better than greedy: {'; '.join(better) or 'none'}.",
        f"- Worse than greedy: {'; '.join(worse) or 'none'}.",
        f"- No difference seen on these questions: {'; '.join(alike) or 'none'}. At least {least} questions "
        "gained and none lost are needed for one to be seen.",
        f"- Greedy decoding has some but not all of {', '.join(open_tasks) or 'no task'}; of every other "
        "task it has all or none, so that there a better way of decoding has little to show. More "
        "would need a model with more such tasks.",
    ]
    if told:
        best = max(told, key=lambda one: one.accuracy)
        lines.append(
            f"- With a verifier that knows the solution, {best.name} comes to {best.accuracy:.1%}: what a "
            "verifier could add at most here."
        )
        lines += [
            f"- {one.name} ran {one.tokens:.0f} tokens a question and {best.name} {best.tokens:.0f}; they "
            f"differ by {abs(best.accuracy - one.accuracy):.1%} of the questions."
            for one in told
            if one is not best
        ]
    return lines
