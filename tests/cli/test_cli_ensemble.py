"""`mixtura ensemble`: training, scoring, generating, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Run
from dense_checkpoints import save_dense
from tiny_checkpoints import save_tiny

TEXT = "the small cat sat on the mat and then it ran. " * 12
TRAIN = ("--length", 24, "--prompt-tokens", 4, "--steps", 2, "--batch", 2, "--num-texts", 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two of different families, the second a Mixture-of-Experts model."""
    folder = tmp_path_factory.mktemp("ensemble")
    return save_dense(folder / "dense"), save_tiny(folder / "experts", seed=1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("method", ["fusion_route", "mixture_of_thoughts"])
def test_what_was_trained_scores_and_answers(
    run: Run, models: tuple[Path, Path], text: Path, tmp_path: Path, method: str
) -> None:
    made = tmp_path / "made"
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "the cat", "chosen": " sat", "rejected": " ran"}) + "\n")
    more = ("--pairs", pairs) if method == "fusion_route" else ()
    options = ("--method", method, "--out", made, "--text", text, *TRAIN, *more, "--json")
    code, said, told = run("ensemble", "train", *models, *options)
    assert code == 0, told
    names = [one["name"] for one in json.loads(said)["stages"]]
    assert names == (["tuning", "preference"] if more else ["interaction"])
    assert (made / "ensemble.safetensors").is_file()
    scored = ("--by", made, "--text", text, "--length", 24, "--prompt-tokens", 4, "--json")
    code, said, told = run("ensemble", "eval", *models, *scored)
    assert code == 0, told
    found = json.loads(said)
    assert len(found["alone"]["all"]) == 2
    assert found["best_by_token"]["all"] <= found["best_by_text"]["all"] <= min(found["alone"]["all"])
    asked = ("--prompt", "the small", "--by", made, "--max-new-tokens", 3, "--json")
    code, said, told = run("ensemble", "generate", *models, *asked)
    assert code == 0, told
    assert 1 <= len(json.loads(said)["token_ids"]) <= 3
    code, _, told = run("ensemble", "generate", *models[::-1], *asked)
    assert code == 2
    assert "in this order" in told


def test_what_nothing_trains_is_asked_by_its_name(run: Run, models: tuple[Path, Path], text: Path) -> None:
    options = ("--by", "bayes_mixture", "--set", "switching=0.1", "--text", text, "--length", 24)
    code, said, told = run("ensemble", "eval", *models, *options)
    assert code == 0, told
    assert "best by token, in hindsight" in said
    code, said, told = run("ensemble", "generate", *models, "--prompt", "the", "--max-new-tokens", 4)
    assert code == 0, told
    assert "tokens in" in told


def test_a_stage_that_is_left_out_is_told(
    run: Run, models: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    options = ("--out", tmp_path / "made", "--own", models[1], "--text", text, *TRAIN)
    code, said, told = run("ensemble", "train", *models, *options)
    assert code == 0, told
    assert "tuning: loss" in said
    assert "preference was left out: it learns from pairs" in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("eval dense", "two models or more, got 1"),
        ("eval dense other", "has another tokenizer than"),
        ("eval dense experts --by fusion_route", "must be trained"),
        ("eval dense experts --by bayes", "did you mean"),
        ("eval dense experts --by empty", "no ensemble in empty"),
        ("eval dense experts --by empty --set a=1", "--set is for a method by its name"),
        ("eval dense experts --set switching=2", "switching"),
        ("eval dense experts --set prior=[1]", "a share for each of 2 models"),
        ("eval dense experts --text nowhere.txt", "no text at nowhere.txt"),
        ("train dense experts --out full", "full is there already"),
        ("train dense experts --out new --method mean_logits", "trains nothing"),
        ("train dense experts --out new --method mixture_of_thoughts --own dense", "no model of its own"),
        ("train dense experts --out new --method mixture_of_thoughts --set stacks=9", "fewer than stacks 9"),
        ("train dense experts --out new --pairs nowhere.jsonl", "cannot be read"),
        ("generate dense experts --prompt the --max-new-tokens 4096", "positions"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    run: Run,
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    said: str,
) -> None:
    for one in models:
        (tmp_path / one.name).symlink_to(one)
    shutil.copytree(models[0], tmp_path / "other")
    vocabulary = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    held = vocabulary["model"]["vocab"]
    held["a"], held["b"] = held["b"], held["a"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(vocabulary))
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    monkeypatch.chdir(tmp_path)
    code, out, told = run("ensemble", *words.split())
    assert code == 2, told
    assert said in told
    assert "Traceback" not in out + told
    assert not (tmp_path / "new").exists()
