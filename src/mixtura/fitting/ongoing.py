"""One fit as it goes along, and where it keeps what it has written so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from mixtura.checkpoints.apply import apply_plan
from mixtura.checkpoints.applying.card import MeasuredLoss
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.fitting.budget import Allowance
from mixtura.fitting.clock import Clock, Notify
from mixtura.fitting.depth import Depth
from mixtura.fitting.journal import Journal
from mixtura.fitting.palette import option_of
from mixtura.fitting.quality import ALL
from mixtura.fitting.records import Measured, Quality, Request
from mixtura.fitting.rounding import Rounder
from mixtura.fitting.texts import Texts
from mixtura.types import Plan


@final
@dataclass(slots=True)
class Ongoing:
    """What one fit knows as it goes along; ``notes`` are for the reader of its result."""

    request: Request
    view: CheckpointView
    tokenizer: Any
    allowance: Allowance
    texts: Texts
    journal: Journal
    rounder: Rounder
    notify: Notify
    clock: Clock
    depth: Depth = field(default_factory=Depth)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, step: str, since: float) -> None:
        """Add the seconds since a moment of `time.monotonic` to those of a step."""
        self.seconds[step] = self.seconds.get(step, 0.0) + time.monotonic() - since


def work_directory(request: Request) -> Path:
    """The directory of a fit's journal, beside its result."""
    return request.work or request.out.with_name(request.out.name + ".work")


def model_directory(fit: Ongoing, measured: Measured) -> Path:
    """Where a candidate is written before it is published: under another budget it is another one."""
    return fit.journal.path(f"model-{measured.candidate.key}")


def written(fit: Ongoing, plan: Plan, measured: Measured) -> Path:
    """Write a candidate as it is to be published, if that has not been done."""
    directory = model_directory(fit, measured)
    if not directory.is_dir():
        fit.notify("writing the model")
        round_for(fit, plan)
        apply_plan(
            plan,
            fit.view.path,
            directory,
            source_name=fit.request.name or None,
            name=fit.request.out.name,
            measured=_loss(measured.quality),
            rounded=fit.rounder.kept,
        )
    return directory


def _loss(quality: Quality) -> MeasuredLoss:
    """What the model card says was lost."""
    return MeasuredLoss(
        kl=quality.kl,
        kl_interval=(quality.kl_low, quality.kl_high),
        same_token=quality.equal_top,
        perplexity=quality.perplexity[ALL],
        num_tokens=quality.num_tokens,
        text="held-out text",
        chose=True,
        details="`measured.json` has all of it, with how it was measured; `report.html` shows it.",
    )


def round_for(fit: Ongoing, plan: Plan) -> None:
    """Round every expert that a plan stores in fewer bits, unless that has been done."""
    by_layer: dict[int, dict[int, tuple[int, ...]]] = {}
    for (layer, expert), action in plan.quantized().items():
        by_layer.setdefault(layer, {})[expert] = (option_of(action),)
    for layer, wanted in by_layer.items():
        fit.rounder.ensure(layer, wanted)
