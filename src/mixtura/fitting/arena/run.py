"""The arena of pruners as a whole: every measurement that is missing, then the page and the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from mixtura.data import specimen
from mixtura.errors import BudgetError, SettingError, check_range
from mixtura.fitting.arena.entries import PRUNERS, Entry, entries
from mixtura.fitting.arena.exam import Sizes
from mixtura.fitting.arena.measured import BOTH, Case, Measurements, Notify
from mixtura.fitting.arena.page import as_json, markdown
from mixtura.fitting.arena.standings import KEEPS, MIDDLE, Standing, mean_of, standings
from mixtura.types import Plan

NUM_TOKENS = 24_576


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """What is to be run.

    Attributes:
        kind: pruners, or mergers beside pruners that leave as many bytes.
        only: names of entries; all where empty.
        num_seeds: each has calibration and held-out text of its own, and lots of the pruner ``random``.
        num_tokens: of each calibration text, in all domains together.
        model: a checkpoint; the specimen where None.
        sizes: how much is asked of each pruned model.
        runs: where traces and measurements are kept.
        out: where the page is written.
    """

    kind: str = PRUNERS
    only: tuple[str, ...] = ()
    num_seeds: int = 3
    num_tokens: int = NUM_TOKENS
    model: Path | None = None
    sizes: Sizes = field(default_factory=Sizes)
    runs: Path = Path("build/arena")
    out: Path = Path("docs/arena")

    def __post_init__(self) -> None:
        check_range("the arena", "seeds", self.num_seeds, 1, 1000)
        if self.num_tokens < 64:
            raise SettingError(f"tokens of the arena must be at least 64, got {self.num_tokens:,}")


def hold(contest: Contest, notify: Notify) -> list[Standing]:
    """Measure what was not measured yet, and write the page and the numbers.

    A measurement is kept as soon as it is there; an arena that was stopped goes on where it was.

    Raises:
        UnknownNameError: a name does not take part.
        BudgetError: not even three quarters of the experts are enough for a token to choose from.
        CheckpointError: the model cannot be read.
        UnsupportedModelError: it is one that mixtura cannot work on.
    """
    taking_part = entries(contest.only, contest.kind)
    measured = Measurements(
        specimen.path() if contest.model is None else contest.model,
        contest.runs / contest.kind,
        contest.sizes,
        contest.num_tokens,
        [name for entry in taking_part for name in entry.statistics],
        [name for entry in taking_part for name in entry.features],
        notify,
    )
    cases = _planned(contest, taking_part, measured, notify)
    missing = [(case, plan) for case, plan in cases if measured.known(plan, case.seed, case.parts) is None]
    for number, (case, plan) in enumerate(missing, start=1):
        found = measured.measure(plan, case.seed, case.parts)
        notify(f"{number}/{len(missing)} {case.said}: KL {found['kl']:.4f}")
    results = [_row(case, measured.measure(plan, case.seed, case.parts)) for case, plan in cases]
    return _publish(contest, measured, results)


def _planned(
    contest: Contest, taking_part: tuple[Entry, ...], measured: Measurements, notify: Notify
) -> list[tuple[Case, Plan]]:
    """Every case with its plan; shares of the experts that routing cannot do with are left out."""
    planned: list[tuple[Case, Plan]] = []
    refused: dict[float, BudgetError] = {}
    for seed in range(contest.num_seeds):
        # Features of experts are not kept by domain.
        domains = measured.trace(seed).domains if contest.kind == PRUNERS else ()
        for case in _cases(taking_part, seed, domains):
            try:
                planned.append((case, measured.plan(case)))
            except BudgetError as error:
                if case.keep not in refused:
                    notify(f"{case.keep:.0%} of the experts are left out: {error}")
                refused[case.keep] = error
    if not planned:
        raise refused[max(refused)]
    return [(case, plan) for case, plan in planned if case.keep not in refused]


def _cases(taking_part: tuple[Entry, ...], seed: int, domains: tuple[str, ...]) -> Iterator[Case]:
    for entry in taking_part:
        for keep in KEEPS:
            yield Case(entry=entry, keep=keep, seed=seed)
        if entry.reads_text and len(domains) > 1:
            for domain in domains:
                yield Case(entry=entry, keep=MIDDLE, seed=seed, domain=domain)


def _row(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    told = {
        "name": case.entry.name,
        "keep": case.keep,
        "seed": case.seed,
        "calibration": case.domain or "all",
    }
    return {**told, **found}


def _publish(contest: Contest, measured: Measurements, results: list[dict[str, Any]]) -> list[Standing]:
    trace = measured.trace(0)
    whole = Plan(trace.source_digest)
    original = mean_of([measured.measure(whole, seed, BOTH) for seed in range(contest.num_seeds)])
    facts = {
        "kind": contest.kind,
        "model": "the specimen" if contest.model is None else f"`{contest.model.name}`",
        "layers": len(trace.layers),
        "experts": max(layer.shape.num_experts for layer in trace.layers),
        "top_k": max(layer.top_k for layer in trace.layers),
        "tokens": contest.num_tokens,
        "num_seeds": contest.num_seeds,
    }
    measured_keeps = {row["keep"] for row in results}
    table = [
        one for keep in KEEPS if keep in measured_keeps for one in standings(results, keep, contest.kind)
    ]
    contest.out.mkdir(parents=True, exist_ok=True)
    page = contest.out / f"{contest.kind}.md"
    page.write_text(markdown(table, original, facts), encoding="utf-8")
    page.with_suffix(".json").write_text(as_json(results, original, facts), encoding="utf-8")
    return table
