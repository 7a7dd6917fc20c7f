"""transformers' Trainer with checkpoints that are whole or not there."""

from __future__ import annotations

import os
import re
import shutil
from abc import ABC
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer

_WRITING = "writing"
_NUMBERED = re.compile(r"checkpoint-(\d+)")


class WholeTrainer(Trainer, ABC):
    """A Trainer whose checkpoints are written aside and renamed into place."""

    def __init__(self, **kwargs: Any) -> None:
        self._aside: Path | None = None
        super().__init__(**kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside) if self._aside else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        target = Path(self.args.output_dir)
        with self._writing(target / _WRITING) as aside:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                name = f"checkpoint-{self.state.global_step}"
                _replace(aside / name, target / name)
                shutil.rmtree(aside)
                for old in checkpoints(target)[: -(self.args.save_total_limit or 1)]:
                    shutil.rmtree(old)
            self.accelerator.wait_for_everyone()

    @contextmanager
    def _writing(self, aside: Path) -> Iterator[Path]:
        self._aside = aside
        try:
            yield aside
        finally:
            self._aside = None


def _replace(source: Path, target: Path) -> None:
    """Put a whole directory in its place, on disk before it is seen there."""
    for file in source.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)


def checkpoints(directory: Path) -> Sequence[Path]:
    """The checkpoints of a training, oldest first."""
    found = [(int(m.group(1)), p) for p in directory.iterdir() if (m := _NUMBERED.fullmatch(p.name))]
    return [path for _, path in sorted(found)]
