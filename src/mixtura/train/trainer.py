"""transformers' Trainer for `MixturaForCausalLM`: balancers, metrics, whole checkpoints, exact resuming."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from transformers import Trainer, TrainerCallback

from mixtura.errors import CheckpointError
from mixtura.methods.balancers import Balancer
from mixtura.modeling.family import MixturaForCausalLM
from mixtura.train.metrics import RoutingMeter
from mixtura.train.text import collate

_WRITING = "writing"
_NUMBERED = re.compile(r"checkpoint-(\d+)")
METRICS = "metrics.jsonl"


@final
class BalanceCallback(TrainerCallback):
    """Lets a model's balancers change their states after each step of the optimizer.

    For transformers' own Trainer: ``Trainer(model=model, ..., callbacks=[BalanceCallback()])``.
    """

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """After the optimizer's step, while gradients are still there."""
        model.end_step()


@final
class MetricsCallback(TrainerCallback):
    """Appends what the trainer logs to ``metrics.jsonl``, routing by layer and time included."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / METRICS
        self.layers: list[dict[str, Any]] = []
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
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        plain = {k: round(float(v), 6) for k, v in logs.items() if "/" not in k}
        seconds = round(self._before + time.monotonic() - self._began, 1)
        line = {"step": state.global_step, "seconds": seconds} | plain | {"layers": self.layers}
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


@final
class MixturaTrainer(Trainer):
    """Trains a `MixturaForCausalLM` on `mixtura.train.text.Sequences`.

    A checkpoint is written aside and renamed into place. A training that continues from one checks that
    every weight is the checkpoint's.
    """

    def __init__(self, *, metrics: MetricsCallback, exact_balance: bool, **kwargs: Any) -> None:
        self._aside: Path | None = None
        self._metrics = metrics
        self._meter = RoutingMeter()
        super().__init__(data_collator=collate, callbacks=[BalanceCallback(), metrics], **kwargs)
        parts = self.args.gradient_accumulation_steps * self.args.world_size
        self._counts_ahead = exact_balance and parts > 1 and _has_losses(self.model)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of a step; balancers get to know their loads first, where losses need them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._counts_ahead and batches:
            self.model.train()
            self.model.count_ahead([self._prepare_inputs(batch) for batch in batches])
        return batches, num_items

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """A micro-batch, its dropout drawn from a seed of its own."""
        torch.manual_seed(self.model.part_seed())
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, while what routing did is counted."""
        given = inputs | {"output_routing": True}
        loss, outputs = super().compute_loss(model, given, True, num_items_in_batch)
        self._meter.add(outputs["routings"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with what routing did since the last time."""
        if "loss" in logs:
            layers = self._meter.take()
            self._metrics.layers = layers
            for place, layer in enumerate(layers):
                logs |= {f"layer_{place}/{k}": v for k, v in layer.items() if not isinstance(v, list)}
        super().log(logs, *args, **kwargs)

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
    def _writing(self, aside: Path) -> Any:
        self._aside = aside
        try:
            yield aside
        finally:
            self._aside = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load every weight and buffer, and see that each is the checkpoint's."""
        target = self.model if model is None else model
        loaded = MixturaForCausalLM.from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        wanted = loaded.state_dict()
        target.load_state_dict(wanted, strict=True)
        for name, value in target.state_dict().items():
            if not torch.equal(value.cpu(), wanted[name].cpu()):
                raise CheckpointError(
                    f"{name} is not what {resume_from_checkpoint} holds; train from the start"
                )


def _has_losses(model: Any) -> bool:
    balance = model.model.balance
    every = (one for place in range(len(balance.layers)) for one in balance.of(place).balancers)
    return any(type(one).loss is not Balancer.loss for one in every)


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
