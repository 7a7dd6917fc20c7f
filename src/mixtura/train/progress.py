"""How far a training is, on the standard error stream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from mixtura.report.screen import screen


@final
class ProgressCallback(TrainerCallback):
    """A bar of steps with the last loss beside it; nothing where the stream is no terminal but its end."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}", markup=False),
            console=screen(stderr=True),
        )
        self._task = self._progress.add_task("training", total=None, loss="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar, in the first process alone."""
        if state.is_world_process_zero:
            self._progress.update(self._task, total=state.max_steps, completed=state.global_step)
            self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """Show the loss."""
        if logs and "loss" in logs:
            self._progress.update(self._task, loss=f"loss {float(logs['loss']):.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self._progress.stop()


def show_progress(trainer: Any, directory: Path, *, bar: bool, tensorboard: bool) -> None:
    """Let a trainer show a bar instead of printing, and write its metrics for TensorBoard, where asked."""
    trainer.remove_callback(PrinterCallback)
    if bar:
        trainer.add_callback(ProgressCallback())
    if tensorboard:
        board = TensorBoardCallback()
        board.logging_dir = str(directory / "tensorboard")
        trainer.add_callback(board)
