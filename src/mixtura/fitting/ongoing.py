"""One fit as it goes along, and where it keeps what it has written so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.fitting.budget import Allowance
from mixtura.fitting.clock import Clock, Notify
from mixtura.fitting.forms.base import Form
from mixtura.fitting.journal import Journal
from mixtura.fitting.publishing import beside
from mixtura.fitting.records import Measured, Request
from mixtura.fitting.texts import Texts


@final
@dataclass(slots=True)
class Ongoing:
    """What one fit knows as it goes along; ``notes`` are for the reader of its result."""

    request: Request
    form: Form
    view: CheckpointView
    tokenizer: Any
    allowance: Allowance
    texts: Texts
    journal: Journal
    notify: Notify
    clock: Clock
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, step: str, since: float) -> None:
        """Add the seconds since a moment of `time.monotonic` to those of a step."""
        self.seconds[step] = self.seconds.get(step, 0.0) + time.monotonic() - since


def work_directory(request: Request) -> Path:
    """The directory of a fit's journal, beside its result."""
    return request.work or beside(request.out)


def model_directory(fit: Ongoing, measured: Measured) -> Path:
    """Where a candidate is written before it is published: under another budget it is another one."""
    return fit.journal.path(f"model-{measured.candidate.key}")


def written(fit: Ongoing, measured: Measured) -> Path:
    """Write a candidate as it is to be published, if that has not been done."""
    directory = model_directory(fit, measured)
    if not directory.is_dir():
        fit.notify("writing the model")
        fit.form.write(measured.candidate, directory, measured.quality)
    return directory
