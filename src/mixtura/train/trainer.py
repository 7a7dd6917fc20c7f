"""transformers' Trainer for `MixturaForCausalLM`: balancers, metrics, whole checkpoints, exact resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from mixtura.errors import CheckpointError
from mixtura.methods.balancers import Balancer
from mixtura.modeling.family import MixturaForCausalLM
from mixtura.running.parallel.entry import Parallel
from mixtura.train.features import SpikeGuard, Teacher, teaching_loss
from mixtura.train.log import MetricsCallback
from mixtura.train.metrics import RoutingMeter
from mixtura.train.mixing import MixedSequences, held_out_losses, numbers
from mixtura.train.sparsity import Sparsity, SparsityCallback
from mixtura.train.spread import cut_optimizer, save_optimizer
from mixtura.train.text import collate
from mixtura.train.whole import WholeTrainer

_SPIKES = "spikes.json"


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
class SpikeCallback(TrainerCallback):
    """Takes a step's gradients away where its loss leaps, so that the optimizer leaves weights alone."""

    def __init__(self, leaps: Callable[[], bool]) -> None:
        self._leaps = leaps

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Before the optimizer's step."""
        if self._leaps():
            for parameter in model.parameters():
                parameter.grad = None


@final
class MixturaTrainer(WholeTrainer):
    """Trains a `MixturaForCausalLM` on `mixtura.train.text.Sequences`.

    A training that continues from one checks that
    every weight is the checkpoint's.

    Args:
        metrics: where routing and losses are noted.
        exact_balance: whether balancers know a step's loads in each of its parts.
        teacher: settings of a teacher and the model itself; None for none.
        spikes: says which steps to leave out; None for none.
        mixing: the text, where its shares are decided as training goes; what is trained on are its numbers.
        sparsity: which weights are zero, where some are to be; None for none.
    """

    def __init__(
        self,
        *,
        metrics: MetricsCallback,
        exact_balance: bool,
        teacher: tuple[Teacher, Any] | None = None,
        spikes: SpikeGuard | None = None,
        parallel: Parallel | None = None,
        mixing: MixedSequences | None = None,
        sparsity: Sparsity | None = None,
        **kwargs: Any,
    ) -> None:
        self._metrics = metrics
        self._parallel, self._mixing, self._sparsity = parallel, mixing, sparsity
        self._meter = RoutingMeter()
        self._teacher, self._spikes = teacher, spikes
        self._step_loss = 0.0
        guards: list[TrainerCallback] = [] if spikes is None else [SpikeCallback(self._leaps)]
        if sparsity is not None:
            guards.append(SparsityCallback(sparsity))
        collator = collate if mixing is None else numbers
        super().__init__(data_collator=collator, callbacks=[*guards, BalanceCallback(), metrics], **kwargs)
        parts = self.args.gradient_accumulation_steps * self.args.world_size
        self._counts_ahead = exact_balance and parts > 1 and _has_losses(self.model)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of a step; balancers get to know their loads first, where losses need them."""
        if self._mixing is not None:
            self._mix(self._mixing)
            # What reads batches ahead has read numbers; which sequences they are is known only now.
            epoch_iterator = (self._mixing.batch(one["number"].tolist()) for one in epoch_iterator)
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._counts_ahead and batches:
            self.model.train()
            self.model.count_ahead([self._prepare_inputs(batch) for batch in batches])
        return batches, num_items

    def _mix(self, mixing: MixedSequences) -> None:
        """Decide what the step at hand and those after it read, where that is not decided."""
        if self.state.global_step < mixing.num_decided:
            return
        args = self.args
        losses = held_out_losses(self.model, mixing, args.per_device_train_batch_size, args.device)
        # All decide by the same numbers, also where the last bit differs between processes.
        told = [losses.tolist()]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast_object_list(told)
        mixing.decide(torch.tensor(told[0], dtype=torch.float64))
        self._metrics.mixture = mixing.described()

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """A micro-batch, its dropout drawn from a seed of its own."""
        torch.manual_seed(self.model.part_seed())
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._spikes is not None:
            self._step_loss += float(loss)
        return loss

    def _leaps(self) -> bool:
        """Whether the loss of the step that is done, over all processes, leaps."""
        assert self._spikes is not None
        total = torch.tensor(self._step_loss, dtype=torch.float64)
        if dist.is_available() and dist.is_initialized():
            total = total.to(self.args.device, torch.float32)
            dist.all_reduce(total)
            total = total / dist.get_world_size()
        self._step_loss = 0.0
        return self._spikes.leaps(float(total))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, while what routing did is counted."""
        given = inputs | {"output_routing": True}
        loss, outputs = super().compute_loss(model, given, True, num_items_in_batch)
        self._meter.add(outputs["routings"])
        if self._teacher is not None and self.model.training:
            loss = loss + self._taught(inputs, outputs["logits"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _taught(self, inputs: dict[str, Any], logits: Any, num_items: Any) -> Any:
        """What the teacher adds to the loss, scaled as the Trainer scales the rest."""
        assert self._teacher is not None
        settings, teacher = self._teacher
        if not settings.teaches(self.state.global_step):
            return logits.new_zeros(())
        known = {
            name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs
        }
        with torch.no_grad():
            told = teacher(**known, use_cache=False).logits
        added = teaching_loss(logits, told, inputs["labels"], settings.temperature, num_items)
        averaged = self.args.average_tokens_across_devices and num_items is not None
        return settings.coefficient * added * (self.accelerator.num_processes if averaged else 1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with what routing did since the last time."""
        if "loss" in logs:
            if self._spikes is not None:
                logs["skipped_steps"] = self._spikes.num_skipped
            if self._sparsity is not None:
                logs["density"] = self._sparsity.density
            layers = self._meter.take()
            self._metrics.layers = layers
            for place, layer in enumerate(layers):
                logs |= {f"layer_{place}/{k}": v for k, v in layer.items() if not isinstance(v, list)}
        super().log(logs, *args, **kwargs)

    def whole_state(self) -> dict[str, Any] | None:
        """All of the model's tensors on the first process where experts lie on several; else None."""
        return None if self._parallel is None else self._parallel.state_dict()

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip by the norm over all experts, wherever they are."""
        if self._parallel is None:
            return super()._clip_grad_norm(model)
        return self._parallel.clip_gradients(self.args.max_grad_norm)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the model as one process has it."""
        if self._parallel is not None and state_dict is None:
            state_dict = self._parallel.state_dict()
        super()._save(output_dir, state_dict)
        # Every process comes here; those that do not write have no such directory.
        if output_dir is None or not self.args.should_save:
            return
        if self._spikes is not None:
            (Path(output_dir) / _SPIKES).write_text(json.dumps(self._spikes.to_dict()), encoding="utf-8")
        if self._mixing is not None:
            self._mixing.save(Path(output_dir))
        if self._sparsity is not None:
            self._sparsity.save(Path(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._parallel is not None:
            save_optimizer(self._parallel, self.optimizer, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._parallel is not None and checkpoint is not None:
            cut_optimizer(self._parallel, self.optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load every weight and buffer, and see that each is the checkpoint's."""
        target = self.model if model is None else model
        if self._spikes is not None:
            kept = Path(resume_from_checkpoint) / _SPIKES
            self._spikes.load(json.loads(kept.read_text(encoding="utf-8")))
        if self._mixing is not None:
            self._mixing.load(Path(resume_from_checkpoint))
            self._metrics.mixture = self._mixing.described()
        if self._sparsity is not None:
            self._sparsity.load(Path(resume_from_checkpoint))
        loaded = MixturaForCausalLM.from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        wanted = loaded.state_dict()
        if self._parallel is not None:
            for name in self._parallel.expert_names():
                wanted[name] = self._parallel.mine_of(name, wanted[name])
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
