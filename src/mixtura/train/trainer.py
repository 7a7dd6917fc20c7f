"""transformers' Trainer for `MixturaForCausalLM`: balancers, metrics, whole checkpoints, exact resuming."""

from __future__ import annotations

from typing import Any, final

import torch
from transformers import TrainerCallback

from mixtura.errors import CheckpointError
from mixtura.methods.balancers import Balancer
from mixtura.modeling.family import MixturaForCausalLM
from mixtura.train.log import MetricsCallback
from mixtura.train.metrics import RoutingMeter
from mixtura.train.text import collate
from mixtura.train.whole import WholeTrainer


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
class MixturaTrainer(WholeTrainer):
    """Trains a `MixturaForCausalLM` on `mixtura.train.text.Sequences`.

    A training that continues from one checks that
    every weight is the checkpoint's.
    """

    def __init__(self, *, metrics: MetricsCallback, exact_balance: bool, **kwargs: Any) -> None:
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
