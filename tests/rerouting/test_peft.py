"""Balanced fine-tuning, other routers and replay in models that PEFT has wrapped for adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rerouted import (
    ADAPTED,
    assert_alike,
    gradients,
    left_padded,
    logits_of,
    model_of,
    texts,
    with_adapters,
    with_labels,
)
from torch import Tensor
from transformers import Trainer, TrainingArguments

import mixtura
from mixtura.errors import UnsupportedModelError, UserError
from mixtura.machine.releases import checkpoint_layers, checkpointing_arguments
from mixtura.rerouting import Balance

BATCH = with_labels(left_padded(texts(4, 10), [10, 7, 9, 4]))
INPUTS = {name: value for name, value in BATCH.items() if name != "labels"}
BALANCERS = ("switch_loss", "global_batch", "loss_free")


def settings(balancer: str) -> dict[str, float]:
    """Strong enough to be seen beside the loss."""
    return {"rate": 0.01} if balancer == "loss_free" else {"coefficient": 1.0}


def balanced(balancer: str, where: str, *, first: bool = False, started: bool = True) -> tuple[Any, Balance]:
    """A model with adapters and a balancer, which comes ``first`` or after them."""
    model = model_of("qwen3_moe").train()
    if first:
        made = mixtura.balance(model, balancer, **settings(balancer))
        return with_adapters(model, where, started=started), made
    wrapped = with_adapters(model, where, started=started)
    return wrapped, mixtura.balance(wrapped, balancer, **settings(balancer))


def named_biases(made: Balance) -> dict[str, Tensor]:
    """The biases by name, for comparing."""
    return {f"bias.{index}": bias.clone() for index, bias in made.biases().items()}


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("where", ADAPTED)
@pytest.mark.parametrize("first", [False, True])
def test_what_adapters_begin_with_is_balanced_like_the_plain_model(
    where: str, balancer: str, first: bool
) -> None:
    if where == "router's copy" and first:
        with pytest.raises(UserError, match=r"Qwen3MoeTopKRouter of layer 0 is copied .* wrap the model"):
            balanced(balancer, where, first=True)
        return
    plain = model_of("qwen3_moe").train()
    own = mixtura.balance(plain, balancer, **settings(balancer))
    expected = plain(**BATCH).loss
    model, made = balanced(balancer, where, first=first, started=False)
    loss = model(**BATCH).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    if own.loss is not None:
        assert made.loss is not None
        torch.testing.assert_close(made.loss, own.loss)
    own.end_step()
    made.end_step()
    assert_alike(named_biases(own), named_biases(made))
    # The trained router learns from the loss; what is frozen only passes it on.
    router = [n for n, p in model.named_parameters() if p.grad is not None and ".gate." in n]
    assert bool(router) == where.startswith("router")
    mixtura.restore(model)
    torch.testing.assert_close(logits_of(model.eval(), INPUTS), logits_of(model_of("qwen3_moe"), INPUTS))


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("where", ["attention", "router"])
def test_padding_counts_nowhere(balancer: str, where: str) -> None:
    found = []
    for pad in (0, 5):
        model, made = balanced(balancer, where)
        ids = texts(2, 6)
        batch = with_labels(left_padded(torch.cat([ids[:, :1].expand(-1, pad), ids], dim=1), [6, 6]))
        # Nothing comes before the first token but padding, from which it is not to be predicted.
        batch["labels"][:, pad] = -100
        model(**batch).loss.backward()
        loss = {} if made.loss is None else {"loss": made.loss.detach()}
        found.append(gradients(model) | loss)
        made.end_step()
        found[-1] |= named_biases(made)
    assert_alike(*found, tolerance=1e-4)


@pytest.mark.parametrize("balancer", BALANCERS)
@pytest.mark.parametrize("where", ["experts", "router"])
def test_micro_batches_and_recomputed_layers_give_the_gradients_of_the_batch(
    balancer: str, where: str
) -> None:
    found = []
    labels = int(BATCH["labels"][:, 1:].ne(-100).sum())
    whole, parts = [slice(0, 4)], [slice(0, 1), slice(1, 3), slice(3, 4)]
    for checkpointing, cuts in ((False, whole), (False, parts), (True, parts)):
        model, made = balanced(balancer, where)
        if checkpointing:
            model.enable_input_require_grads()
            checkpoint_layers(model, use_reentrant=False)
        batches = [{name: value[cut] for name, value in BATCH.items()} for cut in cuts]
        with made.counting():
            for batch in batches:
                model(**batch)
        for batch in batches:
            model(**batch, num_items_in_batch=labels, use_cache=False).loss.backward()
        found.append(gradients(model))
        made.end_step()
        found[-1] |= named_biases(made)
    assert_alike(found[0], found[1], tolerance=1e-4)
    assert_alike(found[1], found[2], tolerance=1e-4)


@pytest.mark.parametrize("where", ADAPTED)
def test_a_trainers_checkpoint_has_the_adapters_and_the_biases(where: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = with_adapters(model_of("qwen3_moe"), where)
    made = mixtura.balance(model, [("loss_free", {"rate": 0.01}), "switch_loss", "global_batch"])
    rows = [{"input_ids": row, "labels": row.clone()} for row in texts(16, 8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **checkpointing_arguments(True, use_reentrant=False),
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[made.callback]).train()  # type: ignore[arg-type]
    assert made.rerouting.clock.step == 3
    assert all(0.01 < bias.abs().max() <= 0.03 + 1e-6 for bias in made.biases().values())
    folder = tmp_path / "checkpoint-3"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "router.json", "router.safetensors"} <= names
    assert "model.safetensors" not in names
    loaded = PeftModel.from_pretrained(model_of("qwen3_moe"), str(folder)).eval()
    mixtura.load_router(loaded, folder)
    torch.testing.assert_close(
        logits_of(loaded, INPUTS), logits_of(model.eval(), INPUTS), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("where", ADAPTED)
def test_another_router_decides_and_is_taken_back(where: str) -> None:
    plain = model_of("qwen3_moe")
    before = logits_of(plain, INPUTS)
    mixtura.set_router(plain, "top_p", p=0.6)
    expected = logits_of(plain, INPUTS)
    model = with_adapters(model_of("qwen3_moe"), where, started=False)
    mixtura.set_router(model, "top_p", p=0.6)
    torch.testing.assert_close(logits_of(model.eval(), INPUTS), expected, rtol=1e-4, atol=1e-5)
    model.train()(**BATCH).loss.backward()
    assert all(slope.isfinite().all() for slope in gradients(model).values())
    assert not torch.allclose(expected, before, atol=1e-4)
    mixtura.restore(model)
    torch.testing.assert_close(logits_of(model.eval(), INPUTS), before, rtol=1e-4, atol=1e-5)


def test_a_router_that_was_set_scores_by_the_adapted_matrix() -> None:
    """With an adapter on the router's matrix, top_k set in place of top-k of a softmax changes nothing."""
    model = with_adapters(model_of("mixtral"), "router").eval()
    expected = logits_of(model, INPUTS)
    mixtura.set_router(model, "top_k")
    torch.testing.assert_close(logits_of(model, INPUTS), expected, rtol=1e-4, atol=1e-4)
    model.train()(**BATCH).loss.backward()
    assert any(".gate." in name and slope.abs().sum() > 0 for name, slope in gradients(model).items())


@pytest.mark.parametrize("where", ADAPTED)
def test_generated_text_is_replayed_in_training(where: str) -> None:
    model = with_adapters(model_of("qwen3_moe"), where).eval()
    with mixtura.record_routing(model) as recording:
        ids = model.generate(input_ids=texts(2, 5), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert [len(tokens) for tokens in recording.tokens] == [8, 8]
    chosen: list[Tensor] = []
    gate = mixtura.open_model(model.get_base_model()).layers[0].router
    with mixtura.replay_routing(model, recording):
        handle = gate.register_forward_hook(lambda m, a, output: chosen.append(output[2]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(3.0)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        handle.remove()
    made = chosen[0].view(2, 9, -1)
    for row in range(2):
        assert torch.equal(made[row, :8], recording.choices[row][0].long())


def test_methods_that_read_experts_do_not_read_them_without_their_adapters() -> None:
    model = with_adapters(model_of("qwen3_moe"), "experts")
    mixtura.set_router(model, "moe_x", train=True)
    with pytest.raises(UnsupportedModelError, match="has adapters"):
        model(**BATCH)
