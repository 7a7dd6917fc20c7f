"""Whole upcyclings and compositions: what routers begin with, what is measured, and going on from there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_checkpoints import logits_of
from tiny_checkpoints import tiny_tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from upcycling_inputs import NOT_B, A, B, C

import mixtura
from mixtura.fitting.upcycling.records import Upcycled
from mixtura.types import Plan


def rows_of(out: Path, layer: int) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(out)
    rows: torch.Tensor = model.get_submodule(f"model.layers.{layer}.mlp.gate").weight.detach()
    return rows


def inputs_of(model: Any, prompt: str) -> list[torch.Tensor]:
    """What each feed-forward part is given for a prompt alone, by layer."""
    found: list[torch.Tensor] = []
    handles = [
        block.mlp.register_forward_pre_hook(lambda _, given: found.append(given[0][0].detach()))
        for block in model.model.layers
    ]
    ids = tiny_tokenizer()(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def test_router_rows_are_what_a_router_is_given_of_each_models_prompts(
    dense: tuple[Path, ...], prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    mixtura.compose(dense, out, prompts=prompts, top_k=1, measure=False)
    model = AutoModelForCausalLM.from_pretrained(dense[0])

    def mean(texts: list[str], layer: int) -> torch.Tensor:
        return torch.stack([inputs_of(model, text)[layer].mean(0) for text in texts]).mean(0)

    for layer in range(2):
        wanted = torch.stack([mean(A, layer), mean(B, layer) - mean(NOT_B, layer), mean(C, layer)])
        wanted = wanted / wanted.norm(dim=1, keepdim=True)
        torch.testing.assert_close(rows_of(out, layer), wanted, atol=1e-5, rtol=1e-4)
    # In the first layer the result's own router is given just that, whatever its experts are.
    made = AutoModelForCausalLM.from_pretrained(out)
    before, after = (inputs_of(one, "some words of prose")[0] for one in (model, made))
    torch.testing.assert_close(after, before)


def test_dume_runs_each_models_text_through_its_own_experts(
    dense: tuple[Path, ...], prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    mixtura.compose(dense, out, method="dume", prompts=prompts, top_k=1, measure=False)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in dense]
    averages = {
        name: torch.stack([dict(model.named_parameters())[name] for model in models]).mean(0)
        for name, _ in models[0].named_parameters()
        if ".mlp." not in name
    }
    texts = [A, B, C]
    tokens: list[list[torch.Tensor]] = []
    for model, own in zip(models, texts, strict=True):
        model.load_state_dict(averages, strict=False)
        tokens.append([torch.cat(parts) for parts in zip(*(inputs_of(model, t) for t in own), strict=True)])
    for layer in range(2):
        x = torch.cat([own[layer] for own in tokens]).double()
        of = torch.cat([torch.full((len(own[layer]),), n) for n, own in enumerate(tokens)])
        y = torch.nn.functional.one_hot(of, 3).double()
        wanted = torch.linalg.solve(x.T @ x + 0.01 * torch.eye(32).double(), x.T @ y).T
        wanted = wanted / wanted.norm(dim=1, keepdim=True) / 0.1
        torch.testing.assert_close(rows_of(out, layer).double(), wanted, atol=2e-3, rtol=2e-2)


def test_what_is_measured_is_what_plain_transformers_computes(
    dense: tuple[Path, ...], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = mixtura.upcycle(dense[0], out, method="dynamic_dino", experts=4, text=text, length=64, tokens=64)
    assert made.promised
    assert made.beside is not None
    assert made.beside.kl < 1e-6
    assert made.beside.largest < 1e-4 < 0.1 < made.beside.spread
    assert made.after is not None
    assert made.after.perplexity["all"] == pytest.approx(made.before[0].perplexity["all"], rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(out)
    dense_model = AutoModelForCausalLM.from_pretrained(dense[0])
    torch.testing.assert_close(logits_of(model), logits_of(dense_model), atol=2e-5, rtol=1e-5)
    assert perplexity(dense_model, text) == pytest.approx(made.before[0].perplexity["all"], rel=0.05)
    assert Upcycled.from_dict(made.to_dict()) == made
    assert Plan.from_json((out / "plan.json").read_text()).actions[0].kind == "become"
    assert "Perplexity on" in (out / "README.md").read_text()
    assert len(made.balance) == 2
    assert all(one.busiest >= 1 for one in made.balance)


def perplexity(model: Any, text: Path) -> float:
    ids = tiny_tokenizer()(text.read_text(), return_tensors="pt")["input_ids"][0]
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    with torch.no_grad():
        loss = model(rows, labels=rows).loss
    return math.exp(float(loss))


def test_text_says_which_neurons_are_shared(dense: tuple[Path, ...], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = mixtura.upcycle(
        dense[0], out, method="sparse_unified_model", experts=3, top_k=3, text=text, tokens=512, length=64,
        settings={"router_std": 0.0},
    )  # fmt: skip
    assert (made.family, made.d_expert, made.shared_width) == ("granitemoeshared", 8, 24)
    # All parts are on and weighted alike: the dense model again, though promised only then.
    assert not made.promised
    assert made.beside is not None
    assert made.beside.largest < 1e-4


def test_training_goes_on_from_it(dense: tuple[Path, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    mixtura.upcycle(dense[0], out, experts=4, measure=False)
    model = AutoModelForCausalLM.from_pretrained(out)
    before = {name: value.clone() for name, value in model.named_parameters() if "gate_up" in name}
    ids = tiny_tokenizer()("the cat sat on the mat")["input_ids"]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=8, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids}] * 16
    first = float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    Trainer(model, arguments, train_dataset=data).train()
    last = float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    assert last < 0.7 * first
    after = dict(model.named_parameters())
    for name, value in before.items():
        # The copies have come apart.
        moved = after[name] - value
        assert all(float(one.abs().max()) > 0 for one in moved)
        assert not torch.equal(moved[0], moved[1])
    records = tmp_path / "records.jsonl"
    records.write_text('{"prompt": "the cat sat", "completion": " on the mat"}\n' * 8)
    few: dict[str, Any] = {"num_steps": 2, "num_sequences": 2, "sequence_length": 96, "rank": 2}
    tuned = mixtura.tune(out, records, tmp_path / "tuned", adapter="expert_lora", progress=False, **few)
    assert tuned.num_steps == 2


def test_nothing_is_left_beside_the_result(dense: tuple[Path, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = mixtura.upcycle(dense[0], out, experts=2, measure=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert made.after is None
