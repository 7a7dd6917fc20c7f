"""`mixtura tune`: the model, its adapter and the data put together, trained or gone on with, and written."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from mixtura.data.examples import Example, digest_of, read_examples
from mixtura.data.tokens import TokenBatch, num_embeddings_of, pad_id
from mixtura.errors import OutputError, UserError
from mixtura.machine.releases import checkpointing_arguments
from mixtura.train.run import begin, check_same, last_line, require_installed
from mixtura.train.sequences import Collator, ExampleSequences
from mixtura.train.tuning.config import TuneConfig
from mixtura.train.tuning.reinforcing import Rollouts, check_answers

ADAPTER = "adapter"
_CHOSEN = "chosen.json"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What a tuning came to: the adapter, its size, its steps, and losses on what was not learned."""

    adapter: Path
    method: str
    num_steps: int
    resumed_from: int
    num_parameters: int
    num_trained: int
    num_examples: int
    num_cut: int
    packed: bool
    eval_before: float | None
    eval_after: float | None
    last: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        names = [name for name in self.__slots__ if name not in ("adapter", "last")]
        values = {name: getattr(self, name) for name in names}
        return {"adapter": str(self.adapter), **values, "last": dict(self.last)}


def run_tuning(config: TuneConfig, directory: Path, *, model_path: Path, progress: bool = True) -> Tuned:
    """Tune in a directory, or go on with the tuning that is there, and write ``directory/adapter``.

    A tuning that was stopped, by whatever means, and goes on has the same weights in the end as one that was
    not.

    Args:
        config: what is asked for.
        directory: of the tuning.
        model_path: the directory of the model.
        progress: whether to show a bar.

    Raises:
        UserError: accelerate or PEFT is missing, the data cannot be learned from, or the method does not suit
            the model.
        CheckpointError: the directory holds a tuning of another configuration, or the model is damaged.
        OutputError: it holds something else, or cannot be written.
    """
    require_installed(tensorboard=config.training.tensorboard)
    from mixtura.checkpoints.tokenizer import load_tokenizer
    from mixtura.train.tuning.models import check_model, load_base, splits_documents
    from mixtura.train.whole import checkpoints

    check_model(model_path, config)
    tokenizer = load_tokenizer(model_path)
    values = _known(config, model_path)
    check_same(values, directory)
    model = load_base(model_path, config)
    examples, measured = _examples(config, tokenizer, model)
    reinforced = config.training.reinforce
    if reinforced is not None:
        check_answers(examples)
    values["text_sha256"] = digest_of(examples)
    check_same(values, directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {directory}: {error.strerror}") from None
    # Each question is answered by itself.
    packed = reinforced is None and splits_documents(model, tokenizer, config)
    data = _Data.of(config, examples, measured, tokenizer, model, packed)
    begin(values, directory)
    adapted = _with_adapter(model, config, examples, directory, progress)
    rollouts = None
    if reinforced is not None:
        rollouts = Rollouts(reinforced, tokenizer, pad_id(tokenizer, num_embeddings_of(model.config)))
    trainer, measure = _trainer(config, adapted, data, directory, progress, rollouts)
    before = _note(directory, "before", measure)
    found = checkpoints(directory)
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    _write_adapter(adapted, directory)
    return Tuned(
        adapter=directory / ADAPTER,
        method=config.adapter.method,
        num_steps=data.num_steps,
        resumed_from=int(found[-1].name.rpartition("-")[2]) if found else 0,
        num_parameters=sum(p.numel() for p in adapted.parameters()),
        num_trained=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        num_examples=len(examples),
        num_cut=data.train.num_cut,
        packed=packed,
        eval_before=before,
        eval_after=None if measure is None else measure(),
        last=last_line(directory),
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    """What a trainer reads, and for how many steps."""

    train: ExampleSequences
    measured: ExampleSequences | None
    collator: Collator
    num_steps: int

    @staticmethod
    def of(
        config: TuneConfig,
        examples: Sequence[Example],
        measured: Sequence[Example],
        tokenizer: Any,
        model: Any,
        packed: bool,
    ) -> _Data:
        """The sequences of a tuning."""
        steps, length = config.training, config.data.sequence_length
        per_step = steps.num_sequences * steps.num_accumulated
        once = ExampleSequences(examples, length, num_sequences=1, seed=config.seed, packed=packed).per_epoch
        num_steps = steps.num_steps or max(1, math.ceil(once * steps.epochs / per_step))
        wanted = num_steps * per_step
        return _Data(
            train=ExampleSequences(examples, length, num_sequences=wanted, seed=config.seed, packed=packed),
            measured=ExampleSequences(measured, length, packed=packed) if measured else None,
            collator=Collator(pad_id(tokenizer, num_embeddings_of(model.config)), apart=packed),
            num_steps=num_steps,
        )


def _known(config: TuneConfig, model_path: Path) -> dict[str, Any]:
    """What must be the same for a tuning to be gone on with."""
    from mixtura.checkpoints.digest import checkpoint_digest

    values: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return values | {"model_digest": checkpoint_digest(model_path)}


def _examples(config: TuneConfig, tokenizer: Any, model: Any) -> tuple[Sequence[Example], Sequence[Example]]:
    embeddings, answers = num_embeddings_of(model.config), config.data.learn == "answers"
    examples = read_examples(config.data.data, tokenizer, embeddings, answers_only=answers)
    if config.data.eval_data is None:
        return examples, ()
    return examples, read_examples(config.data.eval_data, tokenizer, embeddings, answers_only=answers)


def _with_adapter(
    model: Any, config: TuneConfig, examples: Sequence[Example], directory: Path, progress: bool
) -> Any:
    """The model under PEFT, with the experts that the data chooses where the method leaves it to that."""
    from peft import get_peft_model

    from mixtura.adapting import AdapterConfig, start_from
    from mixtura.methods import header

    part = config.adapter
    known = {setting.name for setting in header("adapters", part.method).settings}
    settings = part.settings | ({"seed": config.seed} if "seed" in known else {})
    asked = AdapterConfig(
        method=part.method,
        settings=settings | _chosen(model, config, settings, examples, directory, progress),
        target_modules=part.target_modules,
        layers_to_transform=part.layers,
        train_router=part.train_router,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT asks transformers for what newer releases call otherwise.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
        adapted = get_peft_model(model, asked)
    if part.library:
        start_from(adapted, part.library)
    return adapted


def _chosen(
    model: Any,
    config: TuneConfig,
    settings: Mapping[str, Any],
    examples: Sequence[Example],
    directory: Path,
    progress: bool,
) -> dict[str, Any]:
    """Settings that routing on the data decides; kept, so that a tuning that goes on need not look again."""
    from mixtura.methods import header, load_method
    from mixtura.methods.settings import settings as settings_of
    from mixtura.running.observing import observe

    if "chooses_experts" not in header("adapters", config.adapter.method).tags:
        return {}
    file = directory / _CHOSEN
    if file.exists():
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return kept
    cls = load_method("adapters", config.adapter.method)
    score = settings.get("score", settings_of(cls)["score"].default)
    if settings.get("experts") is not None or score == "all":
        return {}
    tokens = first_tokens(examples, config.adapter.choose_tokens, config.data.sequence_length)
    trace = observe(model, tokens, progress=progress, source_digest="tuning")
    made: dict[str, Any] = cls.settings_from(trace, settings)
    _put(file, json.dumps(made))
    return made


def first_tokens(examples: Sequence[Example], most: int, length: int) -> TokenBatch:
    """The first tokens of the examples as text to observe."""
    rows, total = [], 0
    for example in examples:
        if total >= most:
            break
        rows.append(example.ids[: min(length, most - total)].tolist())
        total += len(rows[-1])
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return TokenBatch(ids, mask, torch.zeros(len(rows), dtype=torch.int64), ("data",))


def _trainer(
    config: TuneConfig,
    model: Any,
    data: _Data,
    directory: Path,
    progress: bool,
    rollouts: Rollouts | None,
) -> tuple[Any, Any]:
    from mixtura.adapting import StepCallback
    from mixtura.train.log import MetricsCallback
    from mixtura.train.progress import show_progress
    from mixtura.train.tuning.trainer import MeasureCallback, TuneTrainer, loss_on

    steps, measured = config.training, data.measured
    trainer = TuneTrainer(
        rollouts=rollouts,
        model=model,
        args=_arguments(config, directory, data.num_steps),
        train_dataset=data.train,
        data_collator=data.collator,
        callbacks=[MetricsCallback(directory), StepCallback(model)],
    )
    show_progress(trainer, directory, bar=progress, tensorboard=steps.tensorboard)
    if measured is None:
        return trainer, None

    def measure() -> float:
        return loss_on(model, measured, data.collator, steps.num_sequences)

    callback = MeasureCallback(measure, steps.eval_steps)
    callback.trainer = trainer
    trainer.add_callback(callback)
    return trainer, measure


def _arguments(config: TuneConfig, directory: Path, num_steps: int) -> Any:
    """What transformers' Trainer is told."""
    from transformers import TrainingArguments

    steps = config.training
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=num_steps,
        per_device_train_batch_size=steps.num_sequences,
        gradient_accumulation_steps=steps.num_accumulated,
        learning_rate=steps.learning_rate,
        warmup_steps=round(steps.warmup_share * num_steps),
        lr_scheduler_type=steps.schedule,
        weight_decay=steps.weight_decay,
        adam_beta1=steps.betas[0],
        adam_beta2=steps.betas[1],
        max_grad_norm=steps.clip_norm,
        save_steps=steps.save_steps,
        save_total_limit=steps.keep,
        logging_steps=steps.log_steps,
        **checkpointing_arguments(steps.activation_checkpointing, use_reentrant=False),
        seed=config.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        report_to=[],
        disable_tqdm=True,
    )


def _note(directory: Path, name: str, measure: Any) -> float | None:
    """The loss before tuning, measured once though the tuning may be gone on with."""
    file = directory / f"{name}.json"
    if measure is None:
        return None
    if not file.exists():
        _put(file, json.dumps({"eval_loss": measure()}))
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["eval_loss"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged; delete it, and the loss is measured again") from None


def _put(file: Path, text: str) -> None:
    aside = file.with_suffix(".part")
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(file)


def _write_adapter(model: Any, directory: Path) -> None:
    aside, target = directory / f"{ADAPTER}.part", directory / ADAPTER
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, save_embedding_layers=False)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
