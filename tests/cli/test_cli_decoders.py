"""`mixtura generate --decoder`, `calibrate` and `observe --analysis`: what they print and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Run
from tiny_checkpoints import save_tiny

_VERIFIER = """def verify(prompt, texts):
    return [float(len(text)) for text in texts]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("decoders") / "model")


def test_a_decoder_answers_and_says_what_it_took(run: Run, model: Path) -> None:
    code, said, told = run(
        "generate", model, "one two", "--max-new-tokens", 4, "--decoder", "scmoe", "--json"
    )
    assert code == 0, told
    values = json.loads(said)
    assert values["cost"]["num_passes"] == values["num_new_tokens"]
    assert len(values["branches"]) == 1
    assert values["text"] == values["branches"][0]["text"]


def test_a_verifier_is_a_function_in_a_file(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(_VERIFIER)
    options = ("--decoder", "best_of_n", "--set", "n=3", "--verifier", tmp_path / "judge.py")
    code, said, told = run("generate", model, "one two", "--max-new-tokens", 4, *options, "--json")
    assert code == 0, told
    branches = json.loads(said)["branches"]
    best = max(branches, key=lambda one: one["verdict"])
    assert json.loads(said)["text"] == best["text"]
    assert [one["verdict"] for one in branches] == [len(one["text"]) for one in branches]


def test_a_calibration_is_made_once_and_refused_by_another_model(
    run: Run, model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(
            json.dumps({"prompt": f"what comes after the letter {n} in the row?", "answer": "so it goes"})
            + "\n"
            for n in "abcd"
        )
    )
    file = tmp_path / "modes.safetensors"
    code, said, told = run("calibrate", "modes", model, "--text", text, "--out", file, "--json")
    assert code == 0, told
    assert json.loads(said)["values"]["importance"]
    code, said, told = run(
        "generate", model, "one", "--max-new-tokens", 3, "--decoder", "modes", "--calibration", file
    )
    assert code == 0, told
    other = save_tiny(tmp_path / "other", seed=1)
    options = ("--decoder", "modes", "--calibration", file, "--max-new-tokens", 3)
    code, said, told = run("generate", other, "one", *options)
    assert code == 2
    assert "was made for another model" in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--decoder", "scmo"], "did you mean 'scmoe'"),
        (["--decoder", "scmoe", "--set", "beta=-1"], "beta of Scmoe must be in [0, 100], got -1"),
        (["--decoder", "scmoe", "--set", "beta"], "a setting is written key=value"),
        (["--set", "beta=1"], "are for a --decoder; name one"),
        (["--decoder", "des"], "give one with --verifier FILE.py"),
        (["--decoder", "des", "--verifier", "none.py"], "there is no file none.py"),
        (["--decoder", "modes"], "make one with 'mixtura calibrate'"),
        (["--decoder", "modes", "--calibration", "none"], "there is no file none"),
        (["--decoder", "logit_averaging"], "give the others with --model-too"),
        (["--decoder", "scmoe,best_of_n", "--set", "n=2"], "--set is for one decoder"),
    ],
)
def test_what_is_wrong_is_one_sentence(run: Run, model: Path, options: list[str], said: str) -> None:
    code, printed, told = run("generate", model, "one", *options)
    assert code == 2
    assert said in told
    assert printed == ""
    assert len(told.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "has no function verify"),
        ("1 / 0", "ZeroDivisionError"),
        ("def verify(prompt, texts):\n    return 1", "the verifier failed (TypeError"),
    ],
)
def test_a_broken_verifier_is_named(run: Run, model: Path, tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "judge.py"
    file.write_text(text)
    options = ("--decoder", "best_of_n", "--set", "n=2", "--verifier", file, "--max-new-tokens", 2)
    code, _, told = run("generate", model, "one", *options)
    assert code == 2
    assert said in told


def test_analyses_are_part_of_what_is_observed(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 8)
    asked = ("--text", tmp_path / "text.txt", "--analysis", "routing_consistency,load")
    code, said, told = run("observe", model, *asked, "--json")
    assert code == 0, told
    found = json.loads(said)["analyses"]
    assert 0 < found["routing_consistency"]["scalars"]["srp"] <= 1
    assert len(found["load"]["rows"]) == len(found["routing_consistency"]["rows"])
    code, _, told = run("observe", model, "--analysis", "routing_consistancy")
    assert code == 2
    assert "did you mean 'routing_consistency'" in told
