"""Tuning as it is used: kinds of data, packing, evaluation, stopped and resumed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_server import Forked
from safetensors.torch import load_file
from train.train_runs import kill_when
from train.tuning.tuned_models import write_model, write_records

import mixtura
from mixtura.errors import CheckpointError, SettingError, UnknownNameError, UnsupportedModelError, UserError

FEW: dict[str, Any] = {
    "num_steps": 6, "num_sequences": 2, "sequence_length": 96, "log_steps": 2, "save_steps": 2, "rank": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "train.jsonl")


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What a tuning wrote in the end."""
    return load_file(run / "adapter/adapter_model.safetensors")


@pytest.mark.parametrize("method", ["expert_lora", "esft", "lora"])
def test_tunes_and_measures(model: Path, data: Path, tmp_path: Path, method: str) -> None:
    held_out = write_records(tmp_path / "eval.jsonl", 10, seed=5)
    settings = FEW | {"num_steps": 12, "learning_rate": 1e-2, "eval_steps": 4}
    if method == "esft":
        del settings["rank"]
    done = mixtura.tune(
        model, data, tmp_path / "run", adapter=method, eval_data=held_out, progress=False, **settings
    )
    assert done.eval_before is not None
    assert done.eval_after is not None
    assert done.eval_after < done.eval_before - 0.1
    assert done.num_steps == 12
    assert done.packed
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8]
    note = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (note["method"], note["peft_type"]) == (method, "MIXTURA")
    if method == "esft":
        assert {len(v) < 8 for v in note["settings"]["experts"].values()} == {True}


def start(model: Path, data: Path, out: Path, *more: str) -> Forked:
    """Start `mixtura tune` in a process of its own."""
    changes = [part for key, value in FEW.items() for part in ("--set", f"{key}={value}")]
    command = ["tune", str(model), "--data", str(data), "--out", str(out)]
    return Forked([*command, "--threads", "1", "--json", *changes, *more])


# One that only learns, and those that act on the steps of the optimizer.
@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["expert_lora", "dr_lora", "scale_zero", "s_mora", "same"])
def test_killed_and_resumed_gives_the_same_weights(
    adapter: str, model: Path, data: Path, tmp_path: Path
) -> None:
    more = ("--adapter", adapter, "--set", "num_steps=10", "--set", "dropout=0.1")
    more += ("--set", "num_accumulated=2", *(("--set", "top_k=1") if adapter == "s_mora" else ()))
    whole = start(model, data, tmp_path / "whole", *more)
    out, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    killed = start(model, data, tmp_path / "killed", *more)
    kill_when(killed, tmp_path / "killed/checkpoint-4")
    assert not (tmp_path / "killed/adapter").exists()
    again = start(model, data, tmp_path / "killed", *more)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert json.loads(out)["resumed_from"] >= 4
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    lines = [
        json.loads(line)["step"] for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()
    ]
    assert lines == [2, 4, 6, 8, 10]


def test_packed_documents_are_learned_like_documents_alone(model: Path, data: Path, tmp_path: Path) -> None:
    """One step on all documents: packed with others or each in a sequence, the gradient is the same."""
    records = write_records(tmp_path / "few.jsonl", 8)
    made = {}
    for packing, count in (("on", 1), ("off", 8)):
        settings = FEW | {"num_steps": 1, "num_sequences": count, "sequence_length": 256, "log_steps": 1}
        done = mixtura.tune(
            model, records, tmp_path / packing, progress=False, packing=packing, clip_norm=1e6, **settings
        )
        assert done.packed == (packing == "on")
        made[packing] = done.last["grad_norm"], done.last["loss"]
    assert made["on"] == pytest.approx(made["off"], rel=1e-3)


@pytest.mark.parametrize("shape", ["messages", "prompt", "text"])
def test_every_kind_of_record_is_learned_from(model: Path, tmp_path: Path, shape: str) -> None:
    records = write_records(tmp_path / "data.jsonl", 12, shape)
    done = mixtura.tune(model, records, tmp_path / "run", progress=False, **FEW | {"num_steps": 2})
    assert done.num_examples == 12
    assert done.last["loss"] > 0


def test_another_configuration_or_data_is_not_gone_on_with(model: Path, data: Path, tmp_path: Path) -> None:
    settings = FEW | {"num_steps": 1}
    mixtura.tune(model, data, tmp_path / "run", progress=False, **settings)
    with pytest.raises(CheckpointError, match=r"another training\.learning_rate"):
        mixtura.tune(model, data, tmp_path / "run", progress=False, **settings | {"learning_rate": 1.0})
    other = write_records(tmp_path / data.name, 9, seed=4)
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["data"]["data"] = str(other)
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="other text"):
        mixtura.tune(model, other, tmp_path / "run", progress=False, **settings)


def test_the_router_is_trained_where_asked(model: Path, data: Path, tmp_path: Path) -> None:
    settings = FEW | {"num_steps": 3, "learning_rate": 1e-2}
    mixtura.tune(model, data, tmp_path / "run", progress=False, train_router=True, **settings)
    made = weights(tmp_path / "run")
    base = load_file(model / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.gate.weight"
        trained = made[f"base_model.model.{name}"]
        assert not torch.equal(trained, base[name])


def test_a_dense_model_is_tuned_by_methods_for_linear_layers(data: Path, tmp_path: Path) -> None:
    dense = write_model(tmp_path / "dense", dense=True)
    with pytest.raises(UnsupportedModelError, match="expert_lora changes experts; choose"):
        mixtura.tune(dense, data, tmp_path / "refused", progress=False, **FEW)
    assert not (tmp_path / "refused").exists()
    done = mixtura.tune(
        dense, data, tmp_path / "run", adapter="lora", progress=False, **FEW | {"num_steps": 2}
    )
    assert done.num_trained > 0


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"adapter": "expert_lore"}, UnknownNameError, "did you mean 'expert_lora'"),
        ({"rnak": 3}, UnknownNameError, "did you mean 'rank'"),
        ({"rank": 99}, SettingError, r"rank of ExpertLora must be in \[1, 16\], got 99"),
        ({"rank": "many"}, SettingError, "rank of ExpertLora must be int"),
        ({"experts": [8]}, SettingError, "which has experts 0 to 7"),
        ({"learning_rate": -1.0}, SettingError, "learning_rate of training must be in"),
        ({"sequence_length": 3}, UserError, "cut before its answer"),
        ({"target_modules": ["q_proj"]}, UserError, "is a linear layer; target others"),
    ],
)
def test_what_cannot_be_is_said(
    model: Path, data: Path, tmp_path: Path, settings: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        mixtura.tune(model, data, tmp_path / "run", progress=False, **FEW | settings)
    assert not list(tmp_path.glob("run/adapter*"))


@pytest.mark.parametrize("method", ["expert_lora", "esft"])
def test_experts_in_few_bits_are_tuned_as_they_are(
    model: Path, data: Path, tmp_path: Path, method: str
) -> None:
    from mixtura.checkpoints.digest import checkpoint_digest
    from mixtura.types import Plan, Quantize

    actions = [Quantize(layer, e, "round_to_nearest", {"bits": 4}) for layer in range(2) for e in range(8)]
    packed = tmp_path / "packed"
    mixtura.apply_plan(Plan(checkpoint_digest(model), tuple(actions)), model, packed, progress=False)
    settings = FEW | {"num_steps": 8, "learning_rate": 1e-2}
    if method == "esft":
        del settings["rank"]
    done = mixtura.tune(
        packed, data, tmp_path / "run", adapter=method, eval_data=data, progress=False, **settings
    )
    assert done.eval_before is not None
    assert done.eval_after is not None
    assert done.eval_after < done.eval_before - 0.02
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())
