"""A `Trainer` that goes back to a checkpoint takes the states of routers and balancers with it."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rerouted import assert_alike, model_of, texts, with_adapters
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

import mixtura
from mixtura.errors import CheckpointError, UserError
from mixtura.rerouting import Balance

ROWS = [{"input_ids": row, "labels": row.clone()} for row in texts(16, 8)]


def training(
    folder: Path,
    *,
    adapters: bool = False,
    router: bool = False,
    balancer: Any = ("loss_free", {"rate": 0.01}),
    metrics: Any = None,
    **given: Any,
) -> tuple[Any, Balance]:
    """A trainer as a script makes it, every time the same."""
    model = model_of("qwen3_moe")
    # A Trainer does not find stacked experts in a checkpoint that has them one by one.
    for layer in model.model.layers:
        layer.mlp.experts.requires_grad_(False)
    if adapters:
        model = with_adapters(model, "router")
    if router:
        mixtura.set_router(model, "ada_moe", num_null=4)
    made = mixtura.balance(model, "switch_loss" if router else [balancer, "switch_loss"])
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        lr_scheduler_type="constant",
        learning_rate=1e-4,
        **({"per_device_train_batch_size": 1, "save_steps": 2, "logging_steps": 1, "seed": 0} | given),
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=ROWS,
        eval_dataset=ROWS[:4],
        callbacks=[made.callback],
        compute_metrics=metrics,  # type: ignore[arg-type]
    ), made


def state(made: Balance) -> dict[str, Tensor]:
    """Weights, biases and the clock."""
    model = made.rerouting.model
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors |= {f"bias.{index}": bias.clone() for index, bias in made.biases().items()}
    return tensors | {"step": torch.tensor(float(made.rerouting.clock.step))}


@pytest.mark.parametrize(
    "given", [{}, {"adapters": True}, {"router": True}, {"gradient_accumulation_steps": 2}, {"bf16": True}]
)
def test_a_resumed_training_ends_as_an_undisturbed_one(given: dict[str, Any], tmp_path: Path) -> None:
    whole, expected = training(tmp_path / "whole", max_steps=6, **given)
    whole.train()
    training(tmp_path / "parts", max_steps=4, **given)[0].train()
    again, made = training(tmp_path / "parts", max_steps=6, **given)
    again.train(resume_from_checkpoint=True)
    assert_alike(state(expected), state(made), tolerance=1e-4)


def test_the_best_checkpoint_brings_its_own_states(tmp_path: Path) -> None:
    numbers = itertools.count()
    trainer, made = training(
        tmp_path,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="number",
        greater_is_better=False,
        save_total_limit=1,
        metrics=lambda _: {"number": next(numbers)},
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    kept = load_file(best / "router.safetensors")
    for index, bias in made.biases().items():
        assert torch.equal(bias, kept[f"{index}.balance.0_bias"])
    assert made.rerouting.clock.step == 2


def test_a_checkpoint_from_elsewhere_has_to_be_read_first(tmp_path: Path) -> None:
    training(tmp_path / "first", max_steps=4)[0].train()
    # Another run's checkpoint of the same step is not mistaken for it.
    training(tmp_path / "second", max_steps=4, seed=1)[0].train()
    elsewhere = str(tmp_path / "first" / "checkpoint-4")
    trainer, made = training(tmp_path / "second", max_steps=6)
    with pytest.raises(UserError, match=r"step 4 of a checkpoint that is not in .*rerouting\.load"):
        trainer.train(resume_from_checkpoint=elsewhere)
    whole, expected = training(tmp_path / "whole", max_steps=6)
    whole.train()
    trainer, made = training(tmp_path / "second", max_steps=6)
    made.rerouting.load(elsewhere)
    trainer.train(resume_from_checkpoint=elsewhere)
    assert_alike(state(expected), state(made), tolerance=1e-4)


def test_a_checkpoint_without_states_is_said_and_one_of_others_refused(tmp_path: Path) -> None:
    training(tmp_path, max_steps=2)[0].train()
    folder = tmp_path / "checkpoint-2"
    other, _ = training(tmp_path, max_steps=4, balancer="alf_lb")
    with pytest.raises(CheckpointError, match="was saved with the routers"):
        other.train(resume_from_checkpoint=True)
    for name in ("router.json", "router.safetensors"):
        (folder / name).unlink()
    again, _ = training(tmp_path, max_steps=4)
    with pytest.warns(UserWarning, match="start anew"):
        again.train(resume_from_checkpoint=True)
    shutil.rmtree(folder)
