"""Questions, answers, and what they took: one entry on one seed's questions at a time, kept once measured."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import torch

from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data.records import Task
from mixtura.data.text import held_out_tasks
from mixtura.data.tokens import encode_text
from mixtura.methods import create
from mixtura.running.decoders.arena.entries import Entry
from mixtura.running.decoders.calibrating import calibrate_on, samples_of
from mixtura.running.decoders.entry import Decoded, decode
from mixtura.running.decoders.probing import save_calibration
from mixtura.running.loading import load

# Raised when a change makes earlier results not comparable.
VERSION = 1
EXTRA_TOKENS = 16
_BATCH = 24
_CALIBRATION_TEXTS = 72

Notify = Callable[[str], None]


@final
class Exam:
    """Lets a model answer the held-out questions of a seed by decoders.

    Args:
        path: a checkpoint with a tokenizer.
        folder: where results and calibrations are kept.
        num_per_task: questions of each task.
        notify: told what is measured.
    """

    def __init__(self, path: Path, folder: Path, num_per_task: int, notify: Notify) -> None:
        self._path = path
        self._folder = folder
        self._number = num_per_task
        self._notify = notify
        self._digest = checkpoint_digest(path)
        self._tokenizer = load_tokenizer(path)
        self._model: Any = None

    def result(self, entry: Entry, seed: int) -> dict[str, Any]:
        """What an entry made of a seed's questions; measured now unless it was before."""
        tasks = held_out_tasks(self._number, seed)
        named = [VERSION, self._digest, asdict(entry), seed, [task.prompt for task in tasks]]
        digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]
        file = self._folder / f"decoders-{seed}-{digest}.json"
        if file.is_file():
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
        self._notify(f"{entry.name}, seed {seed}")
        made = self._measured(entry, tasks, seed)
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".part")
        aside.write_text(json.dumps(made) + "\n", encoding="utf-8")
        aside.replace(file)
        return made

    @property
    def model(self) -> Any:
        """The model, loaded when it is first asked for."""
        if self._model is None:
            self._model = load(self._path, dtype=torch.float32)
        return self._model

    def _measured(self, entry: Entry, tasks: Sequence[Task], seed: int) -> dict[str, Any]:
        started = time.perf_counter()
        needs = {task.prompt: len(encode_text(task.completion, self._tokenizer)) for task in tasks}
        order = sorted(tasks, key=lambda task: needs[task.prompt])
        calibration = self._calibration(entry) if entry.calibrated else None
        rows: list[dict[str, Any]] = []
        total: dict[str, int] = {}
        for start in range(0, len(order), _BATCH):
            part = order[start : start + _BATCH]
            made: list[Decoded] = decode(
                self.model,
                self._tokenizer,
                [task.prompt for task in part],
                create("decoders", entry.decoder, **entry.settings),
                max_new_tokens=max(needs[task.prompt] for task in part) + EXTRA_TOKENS,
                temperature=entry.temperature,
                seed=seed,
                verifier=solution_verifier(part) if entry.told else None,
                calibration=calibration,
            )
            rows += [_row(task, one) for task, one in zip(part, made, strict=True)]
            for name, value in asdict(made[0].cost).items():
                total[name] = total.get(name, 0) + value
        return {"rows": rows, "cost": total, "seconds": round(time.perf_counter() - started, 1)}

    def _calibration(self, entry: Entry) -> Path:
        name = hashlib.sha256(json.dumps([self._digest, asdict(entry)], sort_keys=True).encode()).hexdigest()
        file = self._folder / f"{entry.decoder}-{name[:16]}.safetensors"
        if not file.is_file():
            self._folder.mkdir(parents=True, exist_ok=True)
            decoder = create("decoders", entry.decoder, **entry.settings)
            samples = samples_of(None, self._tokenizer, _CALIBRATION_TEXTS)
            save_calibration(calibrate_on(self.model, decoder, samples, tokenizer=self._tokenizer), file)
        return file


def _row(task: Task, made: Decoded) -> dict[str, Any]:
    return {
        "task": task.task,
        "language": task.language,
        "right": task.is_correct(made.text),
        "any_right": any(task.is_correct(one.text) for one in made.branches),
        "answer_tokens": len(made.token_ids),
    }


def solution_verifier(tasks: Sequence[Task]) -> Callable[[str, Sequence[str]], list[float]]:
    """A verifier that knows the right solutions: the share of a solution's lines that a text begins with.

    No user has it; it bounds from above what any verifier could make of a search.
    """
    known = {task.prompt: task for task in tasks}

    def verify(prompt: str, texts: Sequence[str]) -> list[float]:
        task = known[prompt]
        lines = task.completion.strip().splitlines()
        return [1.0 if task.is_correct(text) else _agreeing(text, lines) for text in texts]

    return verify


def _agreeing(text: str, lines: Sequence[str]) -> float:
    said = text.strip().splitlines()
    number = next((n for n, (one, other) in enumerate(zip(said, lines, strict=False)) if one != other), None)
    return (min(len(said), len(lines)) if number is None else number) / (len(lines) + 1)
