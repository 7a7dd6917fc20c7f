"""Traces and measurements, each made when it is first asked for and kept under what it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.errors import UserError
from mixtura.fitting.arena.entries import Entry
from mixtura.fitting.arena.exam import Exam, Sizes
from mixtura.methods import header
from mixtura.running.observing import observe
from mixtura.running.observing.checkpoint import read_text
from mixtura.types import Plan
from mixtura.types.trace import Trace

Notify = Callable[[str], None]
Part = Literal["loss", "words"]
BOTH: tuple[Part, ...] = ("loss", "words")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One plan: whose, for which share of the experts, from which seed's text, of all domains or of one."""

    entry: Entry
    keep: float
    seed: int
    domain: str | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is measured of it: of one domain's calibration the loss alone."""
        return BOTH if self.domain is None else ("loss",)

    @property
    def said(self) -> str:
        """The case in words."""
        text = "" if self.domain is None else f", calibrated on {self.domain}"
        return f"{self.entry.name}, {self.keep:.0%} of the experts, seed {self.seed}{text}"


@final
class Measurements:
    """What was measured of plans on one model. Plans that do the same are measured once.

    Args:
        path: the checkpoint.
        folder: where all is kept.
        sizes: how much is asked of a pruned model.
        num_tokens: of each calibration text, in all domains together.
        statistics: what to observe of every choice of an expert.
        features: what to observe of every expert.
        notify: told what takes long.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        sizes: Sizes,
        num_tokens: int,
        statistics: Sequence[str],
        features: Sequence[str],
        notify: Notify,
    ) -> None:
        self._path = path
        self._folder = folder
        self._sizes = sizes
        self._num_tokens = num_tokens
        self._statistics = tuple(sorted(set(statistics)))
        self._features = tuple(sorted(set(features)))
        self._notify = notify
        self._traces: dict[int, Trace] = {}
        self._digests: dict[int, str] = {}
        self._exam: tuple[int, Exam] | None = None

    def exam(self, seed: int) -> Exam:
        """The model in memory and what it is asked; one seed's at a time."""
        if self._exam is None or self._exam[0] != seed:
            self._exam = None
            self._exam = (seed, Exam(self._path, self._sizes, seed))
            self._digests[seed] = self._exam[1].digest
        return self._exam[1]

    def trace(self, seed: int) -> Trace:
        """What one pass over a seed's calibration text saw, with every statistic that anyone reads."""
        if seed not in self._traces:
            file = self._folder / f"trace-{seed}-{self._trace_name(seed)}.safetensors"
            if not file.is_file():
                self._observe(seed, file)
            self._traces[seed] = Trace.load(file)
        return self._traces[seed]

    def plan(self, case: Case) -> Plan:
        """What a case does to the model."""
        trace = self.trace(case.seed)
        whole = max(layer.shape.num_experts for layer in trace.layers)
        part = trace if case.domain is None else trace.of(case.domain)
        return case.entry.plan(part, max(1, round(case.keep * whole)), case.seed)

    def known(self, plan: Plan, seed: int, parts: Sequence[Part]) -> dict[str, Any] | None:
        """What was measured of a plan on a seed's held-out text; None where a part is missing."""
        found: dict[str, Any] = {}
        for part in parts:
            kept = self._kept(plan, seed, part)
            if kept is None:
                return None
            found |= kept
        return found

    def measure(self, plan: Plan, seed: int, parts: Sequence[Part]) -> dict[str, Any]:
        """`known`, with what is missing measured first, and kept whole or not at all."""
        found: dict[str, Any] = {}
        for part in parts:
            kept = self._kept(plan, seed, part)
            if kept is None:
                exam = self.exam(seed)
                kept = exam.loss(plan) if part == "loss" else exam.words(plan)
                text = json.dumps({"exam": exam.digest, **kept}, indent=1) + "\n"
                file = self._file(plan, seed, part)
                file.parent.mkdir(parents=True, exist_ok=True)
                aside = file.with_suffix(".part")
                aside.write_text(text, encoding="utf-8")
                aside.replace(file)
            found |= kept
        return found

    def _kept(self, plan: Plan, seed: int, part: Part) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(self._file(plan, seed, part).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if seed not in self._digests:
            self.exam(seed)
        return found if found.pop("exam", None) == self._digests[seed] else None

    def _file(self, plan: Plan, seed: int, part: Part) -> Path:
        done: list[Any] = sorted(plan.dropped().items())
        done += [merge.to_dict() for merges in plan.merged().values() for merge in merges]
        name = hashlib.sha256(json.dumps(done).encode()).hexdigest()[:16]
        return self._folder / f"{name}-{seed}-{part}.json"

    def _trace_name(self, seed: int) -> str:
        # A statistic that was changed is observed again.
        codes = [header("statistics", name).path.read_bytes() for name in self._statistics]
        told = [checkpoint_digest(self._path), self._num_tokens, self._sizes.length, seed, self._statistics]
        told += self._features
        described = json.dumps([*told, *(hashlib.sha256(code).hexdigest() for code in codes)])
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    def _observe(self, seed: int, file: Path) -> None:
        view = open_checkpoint(self._path)
        length = self._sizes.length
        text = read_text(view, None, max_tokens=self._num_tokens, max_length=length, seed=seed)
        self._notify(f"observing {text.num_tokens:,} tokens of calibration text, seed {seed}")
        trace = observe(view.path, text, statistics=self._statistics, features=self._features, progress=False)
        if not trace.layers:
            raise UserError(f"{view.path} has no layers with experts to drop; give a model with experts")
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".part")
        trace.save(aside)
        aside.replace(file)
