"""`mixtura train`: make the model and its text, train or go on training, and write the model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import torch

from mixtura.errors import CheckpointError, OutputError, UserError
from mixtura.machine.releases import checkpointing_arguments
from mixtura.train.config import TrainConfig, differences
from mixtura.train.features import Teacher
from mixtura.train.spread import TIMEOUT_S

MODEL = "model"
_CONFIG = "config.json"
_TEXT, _TEACHER, _START = "text_sha256", "teacher_sha256", "start_digest"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training came to: where the model is, its steps, and the last line of its metrics."""

    model: Path
    num_steps: int
    resumed_from: int
    num_parameters: int
    last: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "model": str(self.model),
            "num_steps": self.num_steps,
            "resumed_from": self.resumed_from,
            "num_parameters": self.num_parameters,
            "last": dict(self.last),
        }


def train(
    config: TrainConfig, directory: Path, *, progress: bool = True, expert_parallel: int = 1
) -> Trained:
    """Train in a directory, or go on with the training that is there, and write ``directory/model``.

    A training that was stopped, by whatever means, and goes on has the same weights in the end as one
    that was not. With ``expert_parallel`` experts lie on groups of so many processes.

    Raises:
        UserError: accelerate is not installed, the text or tokenizer is missing, or processes do not fit.
        CheckpointError: the directory holds a training of another configuration or text.
        OutputError: it holds something else, or cannot be written.
    """
    require_installed(tensorboard=config.training.tensorboard)
    _require_fitting(config, expert_parallel)
    from mixtura.modeling.family import MixturaForCausalLM
    from mixtura.train.starting import started
    from mixtura.train.text import digest
    from mixtura.train.whole import checkpoints

    values = json.loads(json.dumps(config.to_dict()))
    check_same(values, directory)
    tokenizer = _tokenizer(config.data.tokenizer)
    if config.training.start is None:
        model = MixturaForCausalLM(_model_config(config, tokenizer))
    else:
        model, values[_START] = started(config.training.start, config.data.sequence_length, tokenizer)
    streams = _streams(config, tokenizer)
    values[_TEXT] = digest(streams)
    steps = config.training
    teacher = _teacher(steps.teacher, tokenizer, model)
    if teacher is not None:
        values[_TEACHER] = teacher.digest
    data = _sequences(config, streams, tokenizer)
    _try(model, data[0] if config.data.mixture is None else data.held_out(0)[0])
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {directory}: {error.strerror}") from None
    num_parameters = sum(p.numel() for p in model.parameters())
    mixing = None if config.data.mixture is None else data
    trainer = _trainer(config, model, directory, progress, expert_parallel, teacher, mixing)
    with trainer.accelerator.main_process_first():
        begin(values, directory)
    trainer.train_dataset = data
    found = checkpoints(directory)
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    state = trainer.whole_state()
    if trainer.is_world_process_zero():
        _write_model(model, tokenizer, directory, state)
    trainer.accelerator.wait_for_everyone()
    return Trained(
        model=directory / MODEL,
        num_steps=steps.num_steps,
        resumed_from=int(found[-1].name.rpartition("-")[2]) if found else 0,
        num_parameters=num_parameters,
        last=last_line(directory),
    )


def _require_fitting(config: TrainConfig, expert_parallel: int) -> None:
    """Refuse wishes that contradict each other."""
    if config.training.sparsity is not None and expert_parallel > 1:
        raise UserError(
            "sparsity compares the weights of all experts, and --expert-parallel lays them on several "
            "processes; leave one of them out"
        )


def require_installed(*, tensorboard: bool) -> None:
    """Raise `UserError` where accelerate is missing, or TensorBoard though it is asked for."""
    if find_spec("accelerate") is None:
        raise UserError("training needs accelerate; install mixtura[train]")
    if tensorboard and find_spec("tensorboard") is None:
        raise UserError("tensorboard is not installed; install mixtura[tensorboard], or leave it out")


def _streams(config: TrainConfig, tokenizer: Any) -> Mapping[str, Any]:
    """The text by domain; tasks of a curriculum are made as they are read."""
    from mixtura.train.stages import MADE
    from mixtura.train.text import streams_of

    data = config.data
    domains = [name for name in data.domains if name != MADE or not data.stages]
    return streams_of(domains, data.text, tokenizer, config.seed)


def _sequences(config: TrainConfig, streams: Mapping[str, Any], tokenizer: Any) -> Any:
    """What is trained on, by number."""
    from mixtura.train.stages import StagedSequences
    from mixtura.train.text import Sequences, document_start

    data, steps = config.data, config.training
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    per_step = steps.num_accumulated * steps.num_sequences * processes
    start_id = document_start(tokenizer) if data.documents_apart else None
    length, wanted = data.sequence_length, steps.num_steps * per_step
    if data.mixture is not None:
        from mixtura.train.mixing import MixedSequences, Mixture

        return MixedSequences(
            streams,
            Mixture.read(data.mixture),
            num_sequences=wanted,
            per_step=per_step,
            length=length,
            start_id=start_id,
            seed=config.seed,
        )
    if not data.stages:
        return Sequences(streams, wanted, length, config.seed, start_id)
    return StagedSequences(
        streams,
        data.stages,
        tokenizer,
        num_sequences=wanted,
        per_step=per_step,
        length=length,
        start_id=start_id,
        seed=config.seed,
    )


def _try(model: Any, item: Any) -> None:
    """One forward pass, so that a router that lacks what it reads says so before anything is written."""
    from mixtura.modeling.decoder import frozen_noise
    from mixtura.train.text import collate

    with torch.no_grad(), frozen_noise():
        model.train()(**collate([item]))


def _tokenizer(name: str) -> Any:
    from mixtura.checkpoints.tokenizer import load_tokenizer
    from mixtura.data import specimen

    if name == "specimen":
        return load_tokenizer(specimen.path())
    if not Path(name).is_dir():
        raise UserError(f"there is no directory {name}; give tokenizer: specimen, or the directory of one")
    return load_tokenizer(Path(name))


def _model_config(config: TrainConfig, tokenizer: Any) -> Any:
    from mixtura.data.tokens import vocabulary_size
    from mixtura.modeling.family import MixturaConfig

    num_tokens = vocabulary_size(tokenizer)
    follows = {
        "vocab_size": num_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": config.data.sequence_length,
        "seed": config.seed,
    }
    made = MixturaConfig(**(follows | config.model))
    if made.vocab_size < num_tokens:
        raise UserError(
            f"the tokenizer has {num_tokens} tokens, but vocab_size is {made.vocab_size}; leave it out"
        )
    if made.max_position_embeddings < config.data.sequence_length:
        raise UserError(
            f"sequence_length is {config.data.sequence_length}, but max_position_embeddings is "
            f"{made.max_position_embeddings}; leave it out"
        )
    return made


def check_same(values: Mapping[str, Any], directory: Path) -> None:
    """Refuse to go on with another configuration or text: it would not be the same training."""
    before = known(directory)
    found = [] if before is None else differences({key: before.get(key) for key in values}, values)
    if found == [_TEACHER]:
        raise CheckpointError(
            f"the training in {directory} began with a teacher of other weights; go on with that one or "
            "train in another directory"
        )
    if found == [_START]:
        raise CheckpointError(
            f"the training in {directory} began with a model of other weights; go on with that one or train "
            "in another directory"
        )
    if found == [_TEXT]:
        raise CheckpointError(
            f"the training in {directory} began with other text (was it changed, or is this another "
            "Python?); go on with that text or train in another directory"
        )
    if found:
        raise CheckpointError(
            f"the training in {directory} has another {', '.join(found)}; "
            "go on with its own configuration or train in another directory"
        )


def known(directory: Path) -> dict[str, Any] | None:
    """The configuration of the training in a directory, and its text's digest; None where there is none.

    Raises:
        OutputError: the directory holds something else.
    """
    file = directory / _CONFIG
    if not file.exists():
        if directory.exists() and not directory.is_dir():
            raise OutputError(f"{directory} is a file; give a directory to train in")
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if not {"training", "data", _TEXT} <= found.keys():
        raise OutputError(f"{directory} holds something else than a training; give another directory")
    return found


def begin(values: Mapping[str, Any], directory: Path) -> None:
    """Note what a training is of, or see that it is that of the one that is there."""
    check_same(values, directory)
    file = directory / _CONFIG
    if not file.exists():
        aside = file.with_suffix(".part")
        aside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        aside.replace(file)


def _teacher(settings: Teacher | None, tokenizer: Any, model: Any) -> Any:
    """The teacher that a training asks for."""
    if settings is None:
        return None
    from mixtura.train.teaching import load_teacher

    return load_teacher(settings, tokenizer, model.config.vocab_size)


def _trainer(
    config: TrainConfig,
    model: Any,
    directory: Path,
    progress: bool,
    degree: int,
    teacher: Any = None,
    mixing: Any = None,
) -> Any:
    from mixtura.train.features import SpikeGuard
    from mixtura.train.log import MetricsCallback
    from mixtura.train.progress import show_progress
    from mixtura.train.trainer import MixturaTrainer

    steps, arguments = config.training, _arguments(config, directory)
    metrics = MetricsCallback(directory)
    taught = None
    if teacher is not None and steps.teacher is not None:
        taught = (steps.teacher, teacher.model.to(arguments.device))
    trainer = MixturaTrainer(
        metrics=metrics,
        exact_balance=steps.exact_balance,
        teacher=taught,
        spikes=None if steps.skip_spikes is None else SpikeGuard(steps.skip_spikes),
        parallel=_parallel(model, arguments, degree),
        mixing=mixing,
        sparsity=_sparsity(steps, model),
        model=model,
        args=arguments,
    )
    show_progress(trainer, directory, bar=progress, tensorboard=steps.tensorboard)
    return trainer


def _sparsity(steps: Any, model: Any) -> Any:
    """Which weights are to be zero; None where all are trained."""
    if steps.sparsity is None:
        return None
    from mixtura.train.sparsity import Sparsity, read_sparsity

    return Sparsity(model, read_sparsity(steps.sparsity), steps.num_steps)


def _parallel(model: Any, arguments: Any, degree: int) -> Any:
    """The model's experts laid on the processes; None where each has them all."""
    if degree == 1:
        return None
    from mixtura.running.parallel.entry import parallelize

    # Asking for the device is what joins the processes.
    if arguments.device.type != "cpu":
        raise UserError("experts are laid on processes that compute on the CPU; leave --expert-parallel out")
    if arguments.world_size == degree:
        return parallelize(model)
    return parallelize(model, placement="expert_data_parallel", settings={"degree": degree})


def _arguments(config: TrainConfig, directory: Path) -> Any:
    """What transformers' Trainer is told."""
    from transformers import TrainingArguments

    steps = config.training
    on_gpu = torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=steps.num_steps,
        per_device_train_batch_size=steps.num_sequences,
        gradient_accumulation_steps=steps.num_accumulated,
        learning_rate=steps.learning_rate,
        warmup_steps=steps.warmup_steps,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps.decay_steps, "decay_type": "1-sqrt"},
        weight_decay=steps.weight_decay,
        adam_beta1=steps.betas[0],
        adam_beta2=steps.betas[1],
        max_grad_norm=steps.clip_norm,
        save_steps=steps.save_steps,
        save_total_limit=steps.keep,
        logging_steps=steps.log_steps,
        **checkpointing_arguments(steps.activation_checkpointing),
        bf16=steps.bf16,
        seed=config.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
        ddp_broadcast_buffers=False,
        ddp_timeout=TIMEOUT_S,
        ddp_backend="gloo" if several and not on_gpu else None,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        report_to=[],
        disable_tqdm=True,
    )


def _write_model(model: Any, tokenizer: Any, directory: Path, state: Any = None) -> None:
    aside, target = directory / f"{MODEL}.part", directory / MODEL
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, state_dict=state)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def last_line(directory: Path) -> dict[str, Any]:
    """The last line of a training's metrics; empty where there is none."""
    from mixtura.train.log import METRICS

    file = directory / METRICS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return found
