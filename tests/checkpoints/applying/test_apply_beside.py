"""What of a source is not the model: layers beyond it, numbers beside its experts, records of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from applying_sources import MakeSource
from families import tiny_model
from safetensors.torch import load_file, save_file
from tiny_plans import write
from tiny_scaled import raw_entries, write_safetensors
from torch import Tensor
from transformers import AutoModelForCausalLM

from mixtura.checkpoints.apply import apply_plan
from mixtura.checkpoints.applying.card import MeasuredLoss
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.view import open_model
from mixtura.checkpoints.viewing.headers import read_header
from mixtura.running.loading import load
from mixtura.types import Action, Drop, Plan, Quantize

GONE = (1, 6)


def add_tensors(source: Path, out: Path, extra: dict[str, Tensor], **fields: object) -> Path:
    """A copy of a checkpoint with further tensors and fields of its config."""
    out.mkdir()
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **fields}))
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, **extra}, out / "model.safetensors", {"format": "pt"})
    return out


def even_drop(source: Path) -> list[Action]:
    return [Drop(layer.index, GONE) for layer in open_model(source).layers]


@pytest.fixture
def predicting(make_source: MakeSource, tmp_path: Path) -> Path:
    """A checkpoint with a layer for predicting several tokens ahead, stored as one more layer."""
    source = make_source("qwen3_moe")
    last = {n: t for n, t in load_file(source / "model.safetensors").items() if ".layers.2." in n}
    extra = {name.replace(".layers.2.", ".layers.3."): tensor.clone() for name, tensor in last.items()}
    extra["model.layers.3.eh_proj.weight"] = torch.zeros(32, 64)
    return add_tensors(source, tmp_path / "predicting", extra, num_nextn_predict_layers=1)


def test_a_layer_beyond_the_model_goes_with_an_even_drop(predicting: Path, tmp_path: Path) -> None:
    out = write(predicting, tmp_path / "out", *even_drop(predicting))
    assert not [name for name in load_file(out / "model.safetensors") if ".layers.3." in name]
    config = json.loads((out / "config.json").read_text())
    assert (config["num_local_experts"], config["num_nextn_predict_layers"]) == (6, 0)
    assert "`model.layers.3.*`" in (out / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(out).config.num_experts == 6
    view = open_model(predicting)
    edits = view.edits({layer.index: list(GONE) for layer in view.layers})
    assert edits["model.layers.3.eh_proj.weight"].name is None
    assert (
        view.pruned_config({layer.index: list(GONE) for layer in view.layers})["num_nextn_predict_layers"]
        == 0
    )


@pytest.mark.parametrize("how", ["uneven", "quantized"])
def test_it_stays_where_the_config_keeps_its_number(predicting: Path, tmp_path: Path, how: str) -> None:
    quantize = [Quantize(0, expert, "round_to_nearest", {"bits": 4}) for expert in range(8)]
    actions: list[Action] = [Drop(1, GONE)] if how == "uneven" else list(quantize)
    out = write(predicting, tmp_path / "out", *actions)
    stored = load_file(out / "model.safetensors")
    assert (
        "model.layers.3.mlp.experts.7.up_proj.weight" in stored
        or "model.layers.3.mlp.experts.gate_up_proj" in stored
    )
    config = json.loads((out / "config.json").read_text())
    assert (config["num_local_experts"], config["num_nextn_predict_layers"]) == (8, 1)
    assert "Left out" not in (out / "README.md").read_text()


@pytest.mark.parametrize(("experts", "stays"), [(8, False), (5, True)])
def test_only_layers_with_as_many_experts_go(
    make_source: MakeSource, tmp_path: Path, experts: int, stays: bool
) -> None:
    extra = {f"mtp.layers.0.mlp.experts.{e}.up_proj.weight": torch.zeros(2, 2) for e in range(experts)}
    extra["mtp.fc.weight"] = torch.zeros(2, 2)
    source = add_tensors(make_source("qwen3_moe"), tmp_path / "source", extra, mtp_num_hidden_layers=1)
    out = write(source, tmp_path / "out", *even_drop(source))
    assert {name in load_file(out / "model.safetensors") for name in extra} == {stays}
    assert json.loads((out / "config.json").read_text())["mtp_num_hidden_layers"] == int(stays)


def test_what_lies_beside_an_expert_follows_it(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "plain", save_original_format=True)
    beside = {f"model.layers.1.mlp.experts.{e}.up_proj.input_scale": torch.tensor(float(e)) for e in range(8)}
    source = add_tensors(tmp_path / "plain", tmp_path / "source", beside)
    out = load_file(write(source, tmp_path / "out", *even_drop(source)) / "model.safetensors")
    found = [out[f"model.layers.1.mlp.experts.{e}.up_proj.input_scale"].item() for e in range(6)]
    assert found == [0, 2, 3, 4, 5, 7]
    assert "model.layers.1.mlp.experts.6.up_proj.input_scale" not in out
    quantize = [Quantize(1, e, "round_to_nearest", {"bits": 4}) for e in range(8)]
    packed = load_file(write(source, tmp_path / "packed", *quantize) / "model.safetensors")
    assert not [name for name in packed if name.endswith("input_scale")]


def test_a_tensor_of_an_unknown_type_goes_along_as_it_is(make_source: MakeSource, tmp_path: Path) -> None:
    source = add_tensors(make_source("qwen3_moe"), tmp_path / "source", {})
    entries = raw_entries(load_file(source / "model.safetensors"))
    content = bytes(range(16))
    write_safetensors(source / "model.safetensors", {**entries, "extra": ("F4", [4, 8], content)})
    out = write(source, tmp_path / "out", *even_drop(source)) / "model.safetensors"
    entry = read_header(out)["extra"]
    assert (entry.foreign, entry.shape, entry.num_bytes) == ("F4", (4, 8), 16)
    assert out.read_bytes()[entry.offset : entry.offset + 16] == content


def test_a_result_names_the_dtype_that_its_source_does_not(make_source: MakeSource, tmp_path: Path) -> None:
    source = add_tensors(make_source("qwen3_moe"), tmp_path / "source", {})
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    quantize = [Quantize(layer, e, "round_to_nearest", {"bits": 2}) for layer in range(3) for e in range(8)]
    out = write(source, tmp_path / "out", *quantize)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert load(out).dtype == load(source).dtype == torch.float32


def test_records_of_the_source_stay_behind(make_source: MakeSource, tmp_path: Path) -> None:
    source = add_tensors(make_source("qwen3_moe"), tmp_path / "source", {})
    records = ("card.json", "training.json", "trainer_state.json", "training_log.csv", "all_results.json",
               "eval_results.json", "params.json", "SHA256SUMS", "recipe.yaml", "train.log")  # fmt: skip
    kept = ("tokenizer.json", "generation_config.json", "preprocessor_config.json", "vocab.txt", "merges.txt",
            "tekken.json", "special_tokens_map.json", "tokenizer.model", "LICENSE.md", "NOTICE")  # fmt: skip
    for name in (*records, *kept):
        (source / name).write_text("{}")
    names = {file.name for file in write(source, tmp_path / "out", *even_drop(source)).iterdir()}
    assert not names & set(records)
    assert set(kept) <= names


def test_the_card_says_what_was_measured(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("qwen3_moe")
    measured = MeasuredLoss(
        kl=0.00123, kl_interval=(0.001, 0.0015), same_token=0.987, num_tokens=2048, text="the docs"
    )
    plan = Plan(checkpoint_digest(source), tuple(even_drop(source)))
    out = apply_plan(plan, source, tmp_path / "out", progress=False, measured=measured)
    card = (out / "README.md").read_text()
    assert "KL divergence to the source: 0.00123 nats per token, 95 % interval 0.001 to 0.0015\n" in card
    assert "same most likely token: 98.7 %\n" in card
    assert "On 2,048 tokens of the docs, which the plan was not chosen by:" in card
    assert card.index("## Measured loss") < card.index("## Use")
    later = apply_plan(plan, source, tmp_path / "later" / "out", progress=False)
    assert "Measured" not in (later / "README.md").read_text()
