"""Balanced fine-tuning of ordinary transformers models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_inputs
from rerouted import (
    assert_alike,
    gates,
    gradients,
    left_padded,
    logits_of,
    model_of,
    texts,
    with_labels,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import mixtura
from mixtura.checkpoints.view import open_model
from mixtura.errors import SettingError, UnknownNameError, UnsupportedModelError, UserError
from mixtura.machine.releases import checkpoint_layers, checkpointing_arguments
from mixtura.methods._scores import violation

BATCH = with_labels(left_padded(texts(4, 10), [10, 7, 9, 4]))


def seen_by_gates(model: Any, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What each gate returns for a batch, seen from outside: logits and expert ids."""
    found: list[tuple[Tensor, Tensor]] = []
    handles = [
        gate.register_forward_hook(lambda module, args, output: found.append((output[0], output[2])))
        for gate in gates(model)
    ]
    logits_of(model, {name: value for name, value in batch.items() if name != "labels"})
    for handle in handles:
        handle.remove()
    return found


def switch_by_hand(seen: list[tuple[Tensor, Tensor]], valid: Tensor) -> float:
    """The Switch loss of each layer by itself, over tokens that count, summed over layers."""
    total = 0.0
    for logits, ids in seen:
        rows, chosen = logits.float().softmax(-1)[valid], ids[valid]
        share = torch.bincount(chosen.flatten(), minlength=8) / chosen.numel()
        total += float(8 * (share * rows.mean(0)).sum())
    return total


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"])
def test_the_loss_is_each_layers_own_and_padding_counts_nowhere(family: str) -> None:
    model = model_of(family)
    valid = BATCH["attention_mask"].bool().flatten()
    expected = switch_by_hand(seen_by_gates(model, BATCH), valid)
    model.train()
    own = model(**BATCH).loss
    made = mixtura.balance(model, "switch_loss", coefficient=0.5)
    balanced = model(**BATCH).loss
    assert made.loss is not None
    assert made.loss.item() == pytest.approx(0.5 * expected, rel=1e-4)
    torch.testing.assert_close(balanced, own + made.loss)
    balanced.backward()
    assert all(gate.weight.grad.abs().sum() > 0 for gate in gates(model))


def test_layers_collapsed_onto_different_experts_are_all_seen() -> None:
    model = model_of("gpt_oss").train()
    with torch.no_grad():
        for place, gate in enumerate(gates(model)):
            gate.bias[2 * place : 2 * place + 2] = 100.0
            gate.weight.mul_(1e-3)
    made = mixtura.balance(model, "switch_loss", coefficient=1.0)
    output = model(input_ids=texts(4, 8), labels=texts(4, 8), output_router_logits=True)
    assert made.loss is not None
    # Each of three layers uses two of eight experts: the worst there is, 8 / 2 a layer.
    assert made.loss.item() == pytest.approx(12.0, rel=1e-3)
    # Pooled over layers, as transformers does it, this is near the best there is, 2.
    assert output.aux_loss.item() < 3


@pytest.mark.parametrize("balancer", ["switch_loss", "global_batch", "z_loss"])
def test_accumulated_micro_batches_give_the_gradients_of_the_batch(balancer: str) -> None:
    found = []
    labels = int(BATCH["labels"][:, 1:].ne(-100).sum())
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 3), slice(3, 4)]):
        model = model_of("qwen3_moe").train()
        made = mixtura.balance(model, balancer, coefficient=1.0)
        batches = [{name: value[part] for name, value in BATCH.items()} for part in parts]
        with made.counting():
            for batch in batches:
                model(**batch)
        for batch in batches:
            model(**batch, num_items_in_batch=labels).loss.backward()
        found.append(gradients(model))
    assert_alike(*found)


def test_equal_micro_batches_give_the_gradients_of_the_batch_exactly() -> None:
    batch = {"input_ids": texts(4, 8), "labels": texts(4, 8)}
    found = []
    for size in (4, 1):
        model = model_of("qwen3_moe").train()
        made = mixtura.balance(model, "global_batch", coefficient=1.0)
        parts = [{name: value[i : i + size] for name, value in batch.items()} for i in range(0, 4, size)]
        with made.counting():
            for part in parts:
                model(**part)
        for part in parts:
            (model(**part).loss / len(parts)).backward()
        found.append(gradients(model))
    assert_alike(*found)


def test_without_counting_first_the_counts_are_those_so_far() -> None:
    model = model_of("qwen3_moe").train()
    made = mixtura.balance(model, "global_batch", coefficient=1.0)
    parts = [{"input_ids": texts(2, 8, seed), "labels": texts(2, 8, seed)} for seed in (1, 2)]
    losses = []
    for part in parts:
        model(**part)
        assert made.loss is not None
        losses.append(made.loss.item())
    everything = torch.ones(16, dtype=torch.bool)
    model.eval()
    seen = [seen_by_gates(model, part) for part in parts]
    assert losses[0] == pytest.approx(switch_by_hand(seen[0], everything), rel=1e-4)
    expected = 0.0
    for (_, early), (logits, late) in zip(*seen, strict=True):
        share = torch.bincount(torch.cat([early, late]).flatten(), minlength=8) / 64
        expected += float(8 * (share * logits.softmax(-1).mean(0)).sum())
    assert losses[1] == pytest.approx(expected, rel=1e-4)
    # A step's end forgets its counts.
    model.train()
    made.end_step()
    model(**parts[0])
    assert made.loss is not None
    assert made.loss.item() == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("balancer", ["switch_loss", "loss_free", "z_loss"])
def test_activation_checkpointing_changes_neither_gradients_nor_counts(balancer: str) -> None:
    found, biases = [], []
    for checkpointing in (False, True):
        model = model_of("qwen3_moe").train()
        made = mixtura.balance(model, balancer)
        if checkpointing:
            checkpoint_layers(model, use_reentrant=False)
        model(**BATCH, use_cache=False).loss.backward()
        found.append(gradients(model))
        made.end_step()
        biases.append({str(index): bias for index, bias in made.biases().items()})
    assert_alike(*found)
    assert_alike(*biases)


def test_checkpointing_that_hides_gradients_is_refused() -> None:
    model = model_of("qwen3_moe").train()
    mixtura.balance(model, "switch_loss")
    checkpoint_layers(model, use_reentrant=True)
    with pytest.raises(UserError, match="use_reentrant"):
        model(**BATCH, use_cache=False)


def test_the_familys_own_correction_bias_moves_where_it_has_one() -> None:
    model = model_of("deepseek_v3")
    valid = BATCH["attention_mask"].bool().flatten()
    loads = [
        torch.bincount(ids[valid].flatten(), minlength=8).float() for _, ids in seen_by_gates(model, BATCH)
    ]
    before = [gate.e_score_correction_bias.clone() for gate in gates(model)]
    made = mixtura.balance(model, "loss_free", rate=0.01)
    model.train()
    for part in (slice(0, 3), slice(3, 4)):
        model(**{name: value[part] for name, value in BATCH.items()}).loss.backward()
    made.end_step()
    for gate, bias, load in zip(gates(model), before, loads, strict=True):
        torch.testing.assert_close(gate.e_score_correction_bias, bias + 0.01 * (load.mean() - load).sign())
    # Evaluating and generating count nothing.
    model.eval()
    logits_of(model, BATCH)
    after = [gate.e_score_correction_bias.clone() for gate in gates(model)]
    made.end_step()
    assert all(
        torch.equal(gate.e_score_correction_bias, b) for gate, b in zip(gates(model), after, strict=True)
    )


def test_a_correction_bias_that_a_checkpoint_set_is_gone_on_from() -> None:
    model = model_of("deepseek_v3").train()
    made = mixtura.balance(model, "loss_free", rate=0.01)
    for gate in gates(model):
        gate.e_score_correction_bias.fill_(0.5)
    model(**BATCH)
    made.end_step()
    for gate in gates(model):
        assert ((gate.e_score_correction_bias - 0.5).abs() <= 0.01 + 1e-6).all()
        assert (gate.e_score_correction_bias != 0.5).any()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v2"])
def test_elsewhere_a_bias_is_added_to_choose_and_never_to_weigh(family: str) -> None:
    model = model_of(family)
    made = mixtura.balance(model, "loss_free")
    block_gate = gates(model)[-1]
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    logits = block_gate(x)[0]
    seat = made.rerouting.seats[2]
    own = seat.balance
    assert own is not None
    own.state(0)["bias"][5] = 100.0
    moved_logits, moved_weights, moved_ids = block_gate(x)
    torch.testing.assert_close(moved_logits, logits)
    assert (moved_ids == 5).any(-1).float().mean() > 0.4
    assert moved_weights.max() < 20
    if family == "mixtral":
        rows = logits.softmax(-1).gather(1, moved_ids)
        torch.testing.assert_close(moved_weights, rows / rows.sum(-1, keepdim=True))
    if family == "gpt_oss":
        torch.testing.assert_close(moved_weights, logits.gather(1, moved_ids).softmax(-1))


def test_loss_free_balancing_evens_out_a_skewed_model() -> None:
    model = model_of("qwen3_moe")
    batch = {"input_ids": texts(16, 12), "labels": texts(16, 12)}
    made = mixtura.balance(model, "loss_free", rate=0.01)

    def worst() -> float:
        return max(
            violation(torch.bincount(ids.flatten(), minlength=8)).item()
            for _, ids in seen_by_gates(model, batch)
        )

    first = worst()
    for _ in range(80):
        model.train()
        model(**batch)
        made.end_step()
        model.eval()
    assert first > 0.5
    assert worst() < 0.2


def test_trainer_with_accumulation_checkpoints_and_a_bias_that_is_saved(tmp_path: Path) -> None:
    model = model_of("qwen3_moe")
    made = mixtura.balance(model, [("loss_free", {"rate": 0.01}), "z_loss"])
    rows = [{"input_ids": row, "labels": row.clone()} for row in texts(16, 8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **checkpointing_arguments(True, use_reentrant=False),
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[made.callback]).train()  # type: ignore[arg-type]
    assert made.rerouting.clock.step == 3
    biases = made.biases()
    assert all(bias.abs().max() <= 0.03 + 1e-6 for bias in biases.values())
    assert any(bias.abs().max() > 0.01 for bias in biases.values())
    model.eval()
    batch = {"input_ids": texts()}
    expected = logits_of(model, batch)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3").eval()
    mixtura.load_router(loaded, tmp_path / "checkpoint-3")
    torch.testing.assert_close(logits_of(loaded, batch), expected, rtol=1e-4, atol=1e-5)


def test_a_trainer_that_counts_first_trains_as_on_whole_batches(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row.clone()} for row in texts(8, 8)]
    found = []
    for size, parts in ((4, 1), (1, 4)):
        model = model_of("qwen3_moe")
        made = mixtura.balance(model, "global_batch", coefficient=1.0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_steps=2,
            optim="sgd",
            learning_rate=0.5,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[made.callback])  # type: ignore[arg-type]
        made.count_first(trainer)
        trainer.train()
        found.append({name: p.detach() for name, p in model.named_parameters()})
    assert_alike(*found, tolerance=1e-4)


def test_a_run_that_goes_on_from_a_checkpoint_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row.clone()} for row in texts(16, 8)]

    def trainer(model: Any, callback: Any, folder: str, steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=2,
            max_steps=steps,
            lr_scheduler_type="constant",
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])  # type: ignore[arg-type]

    model = model_of("qwen3_moe")
    made = mixtura.balance(model, [("loss_free", {"rate": 0.01}), "global_batch"])
    trainer(model, made.callback, "whole", 4).train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    again = AutoModelForCausalLM.from_pretrained(checkpoint)
    rerouting = mixtura.load_router(again, checkpoint)
    assert rerouting.clock.step == 2
    trainer(again, rerouting.callback, "again", 4).train(resume_from_checkpoint=str(checkpoint))
    mixtura.restore(model)
    mixtura.restore(again)
    assert_alike(dict(model.named_parameters()), dict(again.named_parameters()))


def test_balancing_a_router_that_was_set() -> None:
    model = model_of("mixtral")
    mixtura.set_router(model, "top_k")
    made = mixtura.balance(model, ["loss_free", "switch_loss"])
    model.train()
    model(**BATCH).loss.backward()
    made.end_step()
    assert all(bias.abs().max() > 0 for bias in made.biases().values())
    model = model_of("mixtral")
    mixtura.set_router(model, "ada_moe")
    with pytest.raises(UserError, match="ada_moe reads no selection bias"):
        mixtura.balance(model, "loss_free")


@pytest.mark.parametrize(
    "balancer", ["erc_loss", "conflict_loss", "moec", "quantile", "sequence_loss", "importance"]
)
def test_balancers_that_read_more_get_what_they_read(balancer: str) -> None:
    model = model_of("qwen3_moe").train()
    settings: dict[str, Any] = {"ties": "scores"} if balancer == "conflict_loss" else {}
    made = mixtura.balance(model, balancer, **settings)
    for _ in range(2):
        model(**BATCH).loss.backward()
        made.end_step()
        model.zero_grad()
    if balancer == "quantile":
        assert all(bias.abs().max() > 0 for bias in made.biases().values())
    else:
        model(**BATCH)
        assert made.loss is not None
        assert made.loss.item() > 0
    if balancer == "moec":
        seat = made.rerouting.seats[0]
        assert seat.balance is not None
        assert seat.balance.allowed is not None
        assert int(seat.balance.allowed.sum()) == 6


@pytest.mark.parametrize(
    ("family", "balancer", "settings", "error", "message"),
    [
        ("mixtral", "loss_fre", {}, UnknownNameError, "did you mean 'loss_free'"),
        ("mixtral", "loss_free", {"speed": 1}, SettingError, "LossFree has no setting 'speed'"),
        ("mixtral", "re_moe_l1", {}, UserError, "made for the router re_moe"),
        ("gpt_oss", "erc_loss", {}, UnsupportedModelError, "reads:experts"),
    ],
)
def test_what_cannot_be_done_is_said(
    family: str, balancer: str, settings: Any, error: Any, message: str
) -> None:
    model = model_of(family).train()

    def train() -> None:
        mixtura.balance(model, balancer, **settings)
        model(**BATCH)

    with pytest.raises(error, match=message):
        train()


def test_a_forgotten_end_of_a_step_is_warned_of() -> None:
    model = model_of("qwen3_moe").train()
    made = mixtura.balance(model, "switch_loss")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        model(**BATCH).loss.backward()
        model(**BATCH).loss.backward()
        optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
        made.end_step()
        step()
    with pytest.warns(UserWarning, match=r"balance\.end_step"):
        step()


def test_a_model_is_balanced_once() -> None:
    model = model_of("mixtral")
    mixtura.balance(model, "loss_free")
    with pytest.raises(UserError, match="balanced already"):
        mixtura.balance(model, "switch_loss")
    mixtura.restore(model)
    mixtura.balance(model, "switch_loss")


def test_a_router_that_does_not_choose_by_scores_at_once_cannot_be_biased() -> None:
    model = model_of("phimoe").train()
    mixtura.balance(model, "loss_free")
    with pytest.raises(UnsupportedModelError, match="neither biased nor replayed"):
        model(**BATCH)


def test_without_labels_the_loss_is_there_to_be_added() -> None:
    model = model_of("qwen3_moe").train()
    made = mixtura.balance(model, "switch_loss")
    output = model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"])
    assert output.loss is None
    assert made.loss is not None
    loss = F.cross_entropy(output.logits[:, 0], BATCH["input_ids"][:, 1]) + made.loss
    loss.backward()
    assert gates(model)[0].weight.grad.abs().sum() > 0


# phimoe does not choose by its scores in one step; diffusion_gemma routes other rows than the batch's tokens.
_CANNOT = {"phimoe", "diffusion_gemma"}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - _CANNOT))
def test_every_family_is_balanced(family: str) -> None:
    model = model_of(family).train()
    made = mixtura.balance(model, ["loss_free", "switch_loss"])
    used: list[str] = []
    for layer in open_model(model).layers:
        layer.router.register_forward_hook(lambda m, args, output, name=layer.name: used.append(name))
    with torch.random.fork_rng(devices=[]):
        model(**tiny_inputs(model))
    # A family with experts for images besides uses those for text alone here.
    routers = [layer for layer in open_model(model).layers if layer.name in used and not layer.hash_routed]
    made.end_step()
    before = made.biases()
    corrections = [None if (held := layer.correction_bias()) is None else held.clone() for layer in routers]
    with torch.random.fork_rng(devices=[]):
        model(**tiny_inputs(model))
    assert made.loss is not None
    made.loss.backward()
    made.end_step()
    assert routers
    for layer, old in zip(routers, corrections, strict=True):
        new, moved = layer.correction_bias(), made.biases()[layer.index] - before[layer.index]
        assert moved.abs().max() <= 0.001 + 1e-6
        assert moved.abs().max() > 0
        if old is not None and new is not None:
            torch.testing.assert_close(new - old, moved)
    weights = [layer.tensor(layer.site.router_weight) for layer in routers]
    trained = [p for p in model.parameters() if any(p.data_ptr() == w.data_ptr() for w in weights)]
    assert len(trained) == len(weights)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
