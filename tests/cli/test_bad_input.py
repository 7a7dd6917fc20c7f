"""What goes wrong for a user ends in one clear sentence and its exit code, through the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import run_mixtura, save_tiny
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bad") / "tiny")


@pytest.fixture
def copied(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source, tmp_path / "model")
    return tmp_path / "model"


def refused(*arguments: str, code: int = 2) -> str:
    """The one sentence of a refusal; fails unless the command refuses in the way it must."""
    done = run_mixtura(*arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert not done.stdout.strip()
    return lines[0]


def fit(model: Path | str, out: Path, *more: str, code: int = 2) -> str:
    return refused("fit", str(model), "--out", str(out), *more, code=code)


def change(model: Path, name: str, value: torch.Tensor | None) -> None:
    """Replace (or take away) one tensor of a checkpoint."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    matching = next(key for key in tensors if name in key)
    if value is None:
        del tensors[matching]
    else:
        tensors[matching] = value.to(tensors[matching].dtype)
    save_file(tensors, path, metadata={"format": "pt"})


def test_no_such_path(tmp_path: Path) -> None:
    assert "no directory ./nowhere" in fit("./nowhere", tmp_path / "out")


def test_no_such_hub_id_offline(tmp_path: Path) -> None:
    said = fit("nobody/nothing", tmp_path / "out", "--yes")
    assert "nobody/nothing" in said
    assert "cache" in said or "offline" in said


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    assert "config.json" in fit(tmp_path, tmp_path / "out")


def test_a_dense_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    assert "llama" in fit(tmp_path / "dense", tmp_path / "out")


def test_a_truncated_file(copied: Path, tmp_path: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in fit(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_tensor(copied: Path, tmp_path: Path) -> None:
    change(copied, "experts.3.", None)
    assert "a weight file is missing" in fit(copied, tmp_path / "out")


def test_a_tensor_of_the_wrong_shape(copied: Path, tmp_path: Path) -> None:
    change(copied, "experts.2.down_proj", torch.zeros(3, 5))
    assert "experts.2.down_proj" in fit(copied, tmp_path / "out")


@pytest.mark.parametrize("name", ["mlp.gate.weight", "experts.1.up_proj"])
def test_nan_in_a_router_or_expert(copied: Path, tmp_path: Path, name: str) -> None:
    tensors = load_file(copied / "model.safetensors")
    value = next(tensor for key, tensor in tensors.items() if name in key).clone()
    value[0, 0] = torch.nan
    change(copied, name, value)
    said = fit(copied, tmp_path / "out")
    assert "NaN" in said
    assert not (tmp_path / "out").exists()


def test_a_pickle_checkpoint(copied: Path, tmp_path: Path) -> None:
    (copied / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, copied / "pytorch_model.bin")
    assert "safetensors" in fit(copied, tmp_path / "out")


def test_an_unknown_statistic_and_method(source: Path) -> None:
    assert "'weighted_output_norm'" in refused(
        "observe", str(source), "--statistics", "weighted_output_norms"
    )
    assert "'reap'" in refused("show", "reep")


def test_an_impossible_budget_names_the_smallest(source: Path, tmp_path: Path) -> None:
    said = fit(source, tmp_path / "out", "--model-memory", "1KiB", code=3)
    assert "--model-memory" in said
    assert any(word.isdigit() for word in said.split())


def test_a_process_budget_below_the_runtime(source: Path, tmp_path: Path) -> None:
    assert "--model-memory" in fit(source, tmp_path / "out", "--memory", "1MiB", code=3)


def test_both_budgets_and_nonsense_sizes(source: Path, tmp_path: Path) -> None:
    both = ("--memory", "1GiB", "--model-memory", "1GiB")
    assert "only one" in fit(source, tmp_path / "out", *both)
    assert "'lots' is not a size" in fit(source, tmp_path / "out", "--memory", "lots")
    assert "'soon' is not a time" in fit(source, tmp_path / "out", "--time", "soon")


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "empty"), (b"\x00\xff\xfe\x80" * 99, "UTF-8"), (b"a b c", "at least 200")]
)
def test_text_that_is_empty_binary_or_too_short(
    source: Path, tmp_path: Path, content: bytes, word: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    said = fit(source, tmp_path / "out", "--text", str(path))
    assert word in said
    assert not (tmp_path / "out").exists()


def test_an_output_directory_that_is_not_empty(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    assert "exists already" in fit(source, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep me"


def test_an_output_place_that_cannot_be_written(source: Path) -> None:
    assert "cannot write" in fit(source, Path("/proc/nowhere/out"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up(source: Path, small_disk: Path) -> None:
    said = fit(source, small_disk / "out")
    assert "space" in said or "full" in said or "room" in said
    assert not (small_disk / "out").exists()


def test_a_model_that_fits_is_left_alone(source: Path, tmp_path: Path) -> None:
    done = run_mixtura("fit", str(source), "--out", str(tmp_path / "o"), "--model-memory", "1GiB", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["fits_unchanged"]
    assert told["out"] is None
    assert not (tmp_path / "o").exists()
