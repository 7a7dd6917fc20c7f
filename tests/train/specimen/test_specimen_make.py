"""The specimen is made by `mixtura train`: its recipe, tokenizer and checkpoint, in a micro size."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_server import Forked
from train.train_runs import finish, kill_when

from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data import specimen
from mixtura.modeling.export import exported
from mixtura.modeling.family import MixturaForCausalLM
from mixtura.train.run import _model_config
from mixtura.train.specimen.recipe import VOCABULARY, recipe
from mixtura.train.specimen.tokenizer import learn

MICRO = (
    "hidden_size=32", "num_hidden_layers=2", "num_attention_heads=2", "num_key_value_heads=1", "head_dim=16",
    "moe.num_experts=4", "moe.d_expert=16", "router.top_k=2", "sequence_length=64",
    "num_steps=8", "warmup_steps=2", "decay_steps=2", "save_steps=2", "log_steps=2",
)  # fmt: skip
MAKE = "mixtura.train.specimen.make"
# Where the shipped model's config was written by an earlier version, or differs only in training.
FREE = {"dtype", "transformers_version", "architectures"}


def test_the_recipe_is_the_shipped_models() -> None:
    """An untrained model of the recipe exports to the very config that ships."""
    tokenizer = load_tokenizer(specimen.path())
    described = _model_config(recipe(), tokenizer)
    with torch.device("meta"):
        model = MixturaForCausalLM(described)
    made = json.loads(exported(model).config.to_json_string(use_diff=False))
    made["router_aux_loss_coef"] = 0.0
    shipped = json.loads((specimen.path() / "config.json").read_text())
    assert {k: made.get(k) for k in shipped.keys() - FREE} == {k: shipped[k] for k in shipped.keys() - FREE}
    facts = json.loads((specimen.path() / "training.json").read_text())
    steps = recipe().training
    assert facts["seed"] == recipe().seed
    assert facts["steps"] == steps.num_steps
    assert facts["decay_steps"] == steps.decay_steps
    assert facts["tokens_per_step"] == steps.num_sequences * recipe().data.sequence_length


def command(folder: Path) -> list[str]:
    """`make specimen` in micro size, with everything in one folder and no card."""
    places = ["--run", str(folder / "run"), "--out", str(folder / "model")]
    return [*places, "--threads", "1", "--no-card", *(part for one in MICRO for part in ("--set", one))]


def start(folder: Path, *more: str) -> Forked:
    """The command in a process group of its own."""
    return Forked([*command(folder), *more], entry=MAKE)


@pytest.mark.slow
def test_killed_and_made_again_gives_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, err = finish(start(whole))
    assert code == 0, err
    # To learn the tokenizer once is enough.
    shutil.copytree(whole / "run/tokenizer", killed / "run/tokenizer")
    kill_when(start(killed), killed / "run/training/checkpoint-4")
    assert not (killed / "run/training/model").exists()
    assert not (killed / "model").exists()
    code, _, err = finish(start(killed))
    assert code == 0, err
    lines = (killed / "run/training/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8]
    files = {file.name for file in (whole / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json"} <= files
    for name in files - {"training.json"}:
        assert (whole / "model" / name).read_bytes() == (killed / "model" / name).read_bytes(), name
    _check_ordinary(whole / "model", whole / "run/training")
    fresh = [sys.executable, "-m", MAKE, *command(killed), "--set", "num_stepz=3"]
    wrong = subprocess.run(fresh, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "did you mean 'num_steps'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def _check_ordinary(target: Path, run: Path) -> None:
    """The written model is a Qwen3-MoE that gives the logits of the trained one."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(target)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(target).tokenize("12") == ["1", "2"]
    trained = MixturaForCausalLM.from_pretrained(run / "model").to(torch.bfloat16).float().eval()
    ids = torch.tensor([[0, 40, 50, 60, 70]])
    with torch.no_grad():
        torch.testing.assert_close(model.float()(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-4)
    with safe_open(target / "model.safetensors", "pt") as file:
        assert "model.layers.1.mlp.experts.3.down_proj.weight" in set(file.keys())
    facts = json.loads((target / "training.json").read_text())
    assert facts["steps"] == 8
    assert facts["tokens"] == 8 * 6 * 64
    assert facts["hours"] >= 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("specimen") / "tokenizer"
    assert learn(folder) == folder
    before = folder.stat().st_mtime_ns
    assert learn(folder).stat().st_mtime_ns == before
    return load_tokenizer(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x\n", "Übertrag × œufs ¿qué? 日本", "1234567890 + 7"]
)
def test_tokenizer_gives_the_text_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.slow
def test_every_digit_is_a_token(tokenizer: Any) -> None:
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.tokenize("90210") == list("90210")
