"""`mixtura tune`, `merge` and `generate --adapter` one after the other, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from train.tuning.tuned_models import write_model, write_records
from typer.testing import CliRunner

import mixtura
from mixtura.cli import build_app
from mixtura.errors import UserError

SHORT = [
    part
    for change in ("num_steps=8", "num_sequences=2", "sequence_length=96", "learning_rate=0.01", "rank=2")
    for part in ("--set", change)
]


def invoke(*arguments: str) -> Any:
    """Run the command in this process."""
    return CliRunner().invoke(build_app(), list(arguments))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tuned")
    model, data = write_model(folder / "model"), write_records(folder / "data.jsonl")
    done = invoke("tune", str(model), "--data", str(data), "--out", str(folder / "run"), "--json", *SHORT)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["num_trained"] > 0
    return {"model": model, "data": data, "adapter": folder / "run/adapter"}


def test_the_merged_model_is_plain_transformers_and_says_what_the_adapter_says(
    tuned: dict[str, Path], tmp_path: Path
) -> None:
    done = invoke("merge", str(tuned["adapter"]), "--out", str(tmp_path / "merged"))
    assert done.exit_code == 0, done.output
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    before = transformers.AutoModelForCausalLM.from_pretrained(tuned["model"])
    assert merged.state_dict().keys() == before.state_dict().keys()
    from peft import PeftModel

    import mixtura.adapting  # noqa: F401 - makes the type known

    adapted = PeftModel.from_pretrained(before, tuned["adapter"])
    ids = torch.randint(3, 4000, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, made = adapted(ids).logits, merged(ids).logits
    assert float((made - wanted).abs().max()) < 2e-5 * float(wanted.abs().max())
    prompt = ["Question: reverse alpha beta\n", "--max-new-tokens", "8", "--json"]
    beside = invoke(
        "generate", str(tuned["model"]), *prompt, "--adapter", str(tuned["adapter"]), "--unmerged"
    )
    inside = invoke("generate", str(tuned["model"]), *prompt, "--adapter", str(tuned["adapter"]))
    alone = invoke("generate", str(tmp_path / "merged"), *prompt)
    texts = [json.loads(one.stdout)["text"] for one in (beside, inside, alone)]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != json.loads(invoke("generate", str(tuned["model"]), *prompt).stdout)["text"]


def test_an_adapter_of_another_model_is_refused(tuned: dict[str, Path], tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", num_experts=4)
    for command in (
        ["merge", str(tuned["adapter"]), "--base", str(other), "--out", str(tmp_path / "merged")],
        ["generate", str(other), "hello", "--adapter", str(tuned["adapter"])],
    ):
        done = invoke(*command)
        assert isinstance(done.exception, UserError)
        assert "was made for another model" in str(done.exception)
    assert not list(tmp_path.glob("*merged*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["merge", "{run}", "--out", "{new}"],
            "it has no adapter_config.json; did you mean",
        ),
        (["merge", "nowhere", "--out", "{new}"], "there is no directory nowhere"),
        (["merge", "{adapter}", "--out", "{model}"], "is there already and is left as it is"),
        (["generate", "{model}", "hello", "--adapter", "{model}"], "is not an adapter"),
        (["tune", "{model}", "--data", "nothing.jsonl"], "there is no nothing.jsonl"),
        (["tune", "{adapter}", "--data", "{data}"], "it has no config.json"),
        (["tune", "{model}", "--data", "{data}", "--set", "rank"], "written key=value"),
    ],
)
def test_what_cannot_be_is_said(
    tuned: dict[str, Path], tmp_path: Path, arguments: list[str], says: str
) -> None:
    names = {**tuned, "run": tuned["adapter"].parent, "new": tmp_path / "new"}
    done = invoke(*(argument.format(**names) for argument in arguments))
    assert isinstance(done.exception, UserError), done.output
    assert says in str(done.exception)
    assert not (tmp_path / "new").exists()


def test_an_adapter_beside_a_model_is_loaded_with_it(tuned: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    whole = tmp_path / "whole"
    shutil.copytree(tuned["model"], whole)
    for file in tuned["adapter"].glob("adapter_*"):
        shutil.copy2(file, whole / file.name)
    from mixtura.running.adapters import with_adapter

    loaded, wanted = mixtura.load(whole), with_adapter(mixtura.load(tuned["model"]), tuned["adapter"])
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, wanted(ids).logits)
