"""What a training logs, as lines of JSON that a continued training goes on with."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from transformers import TrainerCallback

METRICS = "metrics.jsonl"


@final
class MetricsCallback(TrainerCallback):
    """Appends what the trainer logs to ``metrics.jsonl``, routing by layer and time included."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / METRICS
        self.layers: list[dict[str, Any]] = []
        self.mixture: dict[str, Any] = {}
        self._began, self._before = time.monotonic(), 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget lines of steps that a continued training does again."""
        self._began = time.monotonic()
        if not state.is_world_process_zero or not self._file.exists():
            return
        kept = [line for line in _whole_lines(self._file) if json.loads(line)["step"] <= state.global_step]
        self._before = json.loads(kept[-1]).get("seconds", 0.0) if kept else 0.0
        aside = self._file.with_suffix(".part")
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        aside.replace(self._file)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """Write a line."""
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        plain = {k: round(float(v), 6) for k, v in logs.items() if "/" not in k}
        seconds = round(self._before + time.monotonic() - self._began, 1)
        routing = {"layers": self.layers} if self.layers else {}
        mixture = {"mixture": self.mixture} if self.mixture else {}
        line = {"step": state.global_step, "seconds": seconds} | plain | mixture | routing
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _whole_lines(file: Path) -> list[str]:
    """The lines of a log, without one that was cut off."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            json.loads(line)
        except json.JSONDecodeError:
            break
        found.append(line)
    return found
