"""What a fit came to: the rows of its table and everything its report shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from mixtura.fitting.frontier import cliff, frontier
from mixtura.fitting.palette import EXPERTS
from mixtura.fitting.quality import ALL
from mixtura.fitting.records import Measured, Quality
from mixtura.types import Plan

BudgetKind = Literal["process", "model"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model of the table: the original, the uniform plan or the chosen one.

    ``accounted_bytes`` is weights, cache and working buffers; ``peak_bytes`` the measured peak of a
    generating process, runtime included. What could not be measured is `None`, with the reason in
    ``note``.
    """

    name: str
    label: str
    weights_bytes: int
    accounted_bytes: int
    active_bytes: float
    quality: Quality
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    note: str = ""


@final
@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and what the original and the new model write after it."""

    prompt: str
    before: str
    after: str


def time_over(left_out: tuple[str, ...]) -> tuple[str, ...]:
    """The sentence that says what a search left out, where it did.

    >>> time_over(("even drops",))
    ('the time was over before everything was tried; left out: even drops; --time gives the search longer',)
    """
    if not left_out:
        return ()
    told = "; left out: " + ", ".join(left_out)
    return (f"the time was over before everything was tried{told}; --time gives the search longer",)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What a fit came to.

    Attributes:
        model: name of the source.
        out: where the new model lies; `None` where the unchanged model fits.
        budget_bytes: the budget as given.
        budget_kind: whether that is the whole process or the model's account.
        model_budget_bytes: what the budget leaves for weights, cache and buffers.
        runtime_bytes: a process with Python, PyTorch and transformers imported and no model.
        context: tokens the account's cache holds; the most the model was made for if that is less.
        plan: what was done; `None` where nothing was, or nothing that mixtura applies itself.
        rows: before, uniform, chosen; only before where the unchanged model fits.
        tried: every candidate measured.
        choice_map: by row, such as an MoE layer, the option of each part by name.
        columns: names of the parts of a row; numbers where it is empty.
        options: all there were, from most bytes to fewest.
        settings: whatever else makes the same result again.
        commands: how the result is run, by what it runs in.
        untouched: names of every tensor that was copied as it was.
        samples: answers side by side.
        left_out: kinds of candidates that the time did not reach.
        notes: what was not done as asked or measured in full, and why; a sentence each.
        about: seed, threads, hardware, versions, date, tokens, seconds by step.
    """

    model: str
    out: Path | None
    budget_bytes: int
    budget_kind: BudgetKind
    model_budget_bytes: int
    runtime_bytes: int
    context: int
    plan: Plan | None
    rows: tuple[Row, ...]
    tried: tuple[Measured, ...] = ()
    choice_map: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    options: tuple[str, ...] = EXPERTS.names
    settings: Mapping[str, Any] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
    untouched: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def before(self) -> Row:
        """The unchanged model."""
        return self.rows[0]

    @property
    def after(self) -> Row:
        """The model to use: the chosen one, or the unchanged one where that fits."""
        return self.rows[-1]

    @property
    def frontier(self) -> tuple[Measured, ...]:
        """What nothing measured is both smaller and better than, the largest first."""
        return frontier(self.tried)

    @property
    def out_of_time(self) -> bool:
        """Whether the time was over before everything was tried."""
        return bool(self.left_out)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Everything a reader should know beside the numbers, a sentence each."""
        rows = tuple(f"{row.name}: {row.note}" for row in self.rows if row.note)
        fall = cliff(self.frontier, self.before.weights_bytes)
        return (*self.notes, *time_over(self.left_out), *rows, *(() if fall is None else (fall.told,)))

    def to_dict(self) -> dict[str, Any]:
        """The object `mixtura fit --json` prints."""
        after = self.after
        return {
            "model": self.model,
            "out": None if self.out is None else str(self.out),
            "fits_unchanged": self.out is None,
            "budget_bytes": self.budget_bytes,
            "budget_kind": self.budget_kind,
            "model_budget_bytes": self.model_budget_bytes,
            "accounted_bytes": after.accounted_bytes,
            "accounted_process_bytes": after.accounted_bytes + self.runtime_bytes,
            "peak_bytes_measured": after.peak_bytes,
            "runtime_bytes": self.runtime_bytes,
            "context": self.context,
            "kl": after.quality.kl,
            "kl_interval": [after.quality.kl_low, after.quality.kl_high],
            "equal_top": after.quality.equal_top,
            "perplexity": {
                "before": self.before.quality.perplexity.get(ALL),
                "after": after.quality.perplexity.get(ALL),
            },
            "tokens_per_second": after.tokens_per_second,
            "plan": None if self.plan is None else json.loads(self.plan.to_json()),
            "rows": [asdict(row) for row in self.rows],
            "tried": [
                {
                    "label": m.candidate.label,
                    "accounted_bytes": m.account_bytes,
                    "active_bytes": m.active_bytes,
                    "kl": m.quality.kl,
                    "equal_top": m.quality.equal_top,
                    "perplexity": m.quality.perplexity.get(ALL),
                    "on_frontier": m in self.frontier,
                }
                for m in self.tried
            ],
            "settings": dict(self.settings),
            "commands": dict(self.commands),
            "out_of_time": self.out_of_time,
            "left_out": list(self.left_out),
            "notes": list(self.remarks),
            "about": dict(self.about),
        }
