"""What a measurement was made with, so that it can be made again."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

import mixtura
from mixtura.data.text import comparability_warning
from mixtura.fitting.records import Request
from mixtura.fitting.texts import Texts
from mixtura.machine.processor import processor_name
from mixtura.report.units import format_seconds


def processor() -> str:
    """The processor's name and cores."""
    return f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def environment(request: Request, texts: Texts, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Seed, text, hardware, versions, date and times of a fit."""
    judged = sum(int(part.attention_mask.sum()) for part in texts.held_out)
    calibrated = sum(int(part.attention_mask.sum()) for part in texts.calibration)
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": processor(),
        "mixtura": mixtura.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "seed": request.seed,
        "text": str(request.text)
        if request.text
        else "the calibration and held-out text that comes with mixtura",
        "calibration tokens": calibrated,
        "held-out tokens": judged,
        "tokens/s": "one sequence, after a prompt of at most 64 tokens",
        "time": ", ".join(f"{step}: {format_seconds(value)}" for step, value in seconds.items()),
    }
    warning = None if request.text else comparability_warning()
    return about | ({"note": warning} if warning else {})
