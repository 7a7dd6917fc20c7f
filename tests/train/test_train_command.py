"""`mixtura train` as it is used: the example, wrong keys, stopped and resumed, several processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train.train_runs import finish, kill_when, start, write_config
from typer.testing import CliRunner

import mixtura
from mixtura.cli import build_app
from mixtura.errors import CheckpointError, UserError
from mixtura.train.config import build_config, read_config
from mixtura.train.run import train

EXAMPLE = Path(__file__).parents[2] / "examples/train.yaml"


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What a training wrote in the end."""
    return load_file(run / "model/model.safetensors")


def assert_equal(one: Path, two: Path) -> None:
    """Two trainings gave the same weights and balancer states, bit by bit."""
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert any("experts.bank.gate_up_proj" in name for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_weights(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    code, _, err = finish(start(config, "--out", str(tmp_path / "whole")))
    assert code == 0, err
    killed = tmp_path / "killed"
    kill_when(start(config, "--out", str(killed)), killed / "checkpoint-6")
    assert not (killed / "model").exists()
    # What a kill in the middle of writing leaves behind does not disturb.
    (killed / "writing/checkpoint-9").mkdir(parents=True, exist_ok=True)
    (killed / "writing/checkpoint-9/model.safetensors").write_bytes(b"half")
    code, out, err = finish(start(config, "--out", str(killed), "--json"))
    assert code == 0, err
    assert json.loads(out)["resumed_from"] >= 6
    assert_equal(tmp_path / "whole", killed)
    lines = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert lines == [2, 4, 6, 8, 10, 12]


@pytest.mark.slow
def test_two_processes_train_and_resume(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    code, _, err = finish(start(config, "--out", str(tmp_path / "whole"), processes=2))
    assert code == 0, err
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", resumed)
    shutil.rmtree(resumed / "checkpoint-12")
    shutil.rmtree(resumed / "model")
    code, _, err = finish(start(config, "--out", str(resumed), processes=2))
    assert code == 0, err
    assert_equal(tmp_path / "whole", resumed)


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    """The same sequences a step, cut otherwise: as parts, or over processes. Without noise they agree."""
    plain = [
        "--set",
        "model.layers=null",
        "--set",
        "attention_dropout=0",
        "--set",
        "router={name: top_k, top_k: 2}",
    ]
    config = [str(write_config(tmp_path, num_steps=3, decay_steps=1, save_steps=3)), *plain]
    balancers = ["--set", "balancers=[loss_free, switch_loss]"]
    one = start(
        *config,
        *balancers,
        "--set",
        "num_accumulated=1",
        "--set",
        "num_sequences=4",
        "--out",
        str(tmp_path / "one"),
    )
    assert finish(one)[0] == 0
    two = start(
        *config, *balancers, "--set", "num_accumulated=1", "--out", str(tmp_path / "two"), processes=2
    )
    assert finish(two)[0] == 0
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_the_example_trains(tmp_path: Path) -> None:
    short = ["num_steps=4", "warmup_steps=1", "decay_steps=1", "save_steps=4", "log_steps=2", "router=top_p"]
    changes = [part for one in short for part in ("--set", one)]
    done = CliRunner().invoke(
        build_app(), ["train", str(EXAMPLE), *changes, "--out", str(tmp_path / "run"), "--json"]
    )
    assert done.exit_code == 0, done.output
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 4
    assert len(line["layers"]) == 3
    layer = line["layers"][0]
    assert sum(layer["load"]) == pytest.approx(1, abs=1e-3)
    assert {"entropy", "dropped", "dead", "logit_norm", "max_over_mean"} <= layer.keys()
    model = mixtura.load(tmp_path / "run/model")
    assert type(model.model.blocks[0].router).__name__ == "TopP"
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()


def test_another_configuration_is_not_resumed(tmp_path: Path) -> None:
    file = write_config(tmp_path, num_steps=1, warmup_steps=0, decay_steps=0)
    train(read_config(file), tmp_path / "run", progress=False)
    with pytest.raises(CheckpointError, match=r"another training\.learning_rate"):
        train(read_config(file, ["learning_rate=0.5"]), tmp_path / "run", progress=False)
    train(read_config(file, ["keep=3"]), tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("num_stepz=3", "did you mean 'num_steps'"),
        ("modle.hidden_size=3", "did you mean 'model'"),
        ("model.hiden_size=3", "did you mean 'hidden_size'"),
        ("num_steps", "written key=value"),
        ("num_steps=many", "must be of type int"),
        ("num_steps=-1", "must be in"),
        ("warmup_steps=12", "lower one of them"),
        ("betas=[0.9]", "two numbers"),
        ("data.tokeniser=x", "did you mean 'tokenizer'"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, change: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_config(write_config(tmp_path), [change])


def test_the_command_exits_with_two(tmp_path: Path) -> None:
    code, _, err = finish(start(str(write_config(tmp_path)), "--set", "num_stepz=3"))
    assert code == 2
    assert err.startswith("error: no key 'num_stepz'; did you mean 'num_steps'")
    assert len(err.strip().splitlines()) == 1


def test_methods_are_set_by_name_and_by_setting(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    moe = read_config(file, ["router=ada_moe"]).model["moe"]
    assert moe["router"] == "ada_moe"
    assert read_config(file, ["router=top_k", "router.top_k=3"]).model["moe"]["router"] == {
        "name": "top_k",
        "top_k": 3,
    }
    named = read_config(file, ["experts=latent", "experts.width=8", "form=chain", "form.iterations=3"])
    assert named.model["moe"]["experts"] == {"name": "latent", "width": 8}
    assert named.model["moe"]["form"] == {"name": "chain", "iterations": 3}
    mixed = read_config(file, ["mixer=smear"]).model["moe"]
    assert mixed["mixer"] == "smear"
    assert "router" not in mixed
    assert build_config({}).training.num_steps == 1000


@pytest.mark.parametrize(
    ("content", "says"), [("a: [", "is not YAML"), ("- 1", "keys and values"), ("data: 3", "keys and values")]
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UserError, match=says):
        read_config(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="cannot read"):
        read_config(tmp_path / "none.yaml")
