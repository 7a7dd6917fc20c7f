"""transformers' Trainer for a model with an adapter: exact resuming, and losses over answers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import TrainerCallback

from mixtura.errors import CheckpointError
from mixtura.train.sequences import IGNORED, Collator
from mixtura.train.tuning.reinforcing import Rollouts
from mixtura.train.whole import WholeTrainer

_WEIGHTS = "adapter_model.safetensors"


@final
class TuneTrainer(WholeTrainer):
    """Trains an adapter; a training that continues has every weight of the checkpoint's.

    Args:
        rollouts: draws answers and gives their loss; None to learn the answers that are given.
        others: what `transformers.Trainer` is told.
    """

    def __init__(self, *, rollouts: Rollouts | None = None, **others: Any) -> None:
        self._rollouts = rollouts
        super().__init__(**others)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of the answers that are given, or of those that are drawn."""
        if self._rollouts is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        # A step's micro-batches have as many questions each, so that their mean is the step's.
        return self._rollouts.loss(model, inputs) / self.args.gradient_accumulation_steps

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and beside the loss what drawn answers came to."""
        more = self._rollouts.taken() if self._rollouts is not None and "loss" in logs else {}
        super().log(logs | more, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        target: Any = self.model
        wanted = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
        set_peft_model_state_dict(target, wanted)
        loaded = get_peft_model_state_dict(target, save_embedding_layers=False)
        for name, value in wanted.items():
            if name not in loaded or not torch.equal(loaded[name].cpu(), value):
                raise CheckpointError(
                    f"{name} is not what {resume_from_checkpoint} holds; tune anew in another directory"
                )


@final
class MeasureCallback(TrainerCallback):
    """Measures the loss on what is not learned, every so many steps."""

    def __init__(self, measure: Callable[[], float], every: int) -> None:
        self._measure, self._every = measure, every
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, where it is time, and log it."""
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            # Logging takes back that something else is to be logged.
            wanted = control.should_log
            self.trainer.log({"eval_loss": self._measure()})
            control.should_log = wanted


@torch.no_grad()
def loss_on(model: Any, sequences: Dataset[Any], collator: Collator, batch_size: int) -> float:
    """The mean loss in nats over all tokens that are to be predicted; training goes on as it was."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    number: Sequence[int] = range(len(sequences))  # type: ignore[arg-type]
    for start in range(0, len(number), batch_size):
        batch = collator([sequences[place] for place in number[start : start + batch_size]])
        batch = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        # Given to the model, too, so that an adapter knows where the answers begin.
        labels = batch["labels"][:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        wanted = labels != IGNORED
        total += float(torch.nn.functional.cross_entropy(logits[wanted], labels[wanted], reduction="sum"))
        count += int(wanted.sum())
    model.train(was_training)
    return total / max(count, 1)
