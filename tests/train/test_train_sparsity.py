"""Trainings that set weights to zero: what is left, exact resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train.train_runs import write_config

from mixtura.errors import CheckpointError, SettingError, UserError
from mixtura.train.config import build_config, read_yaml
from mixtura.train.run import train

FEWER = {"name": "gra_net", "density": 0.25, "every": 2, "end": 0.5}


def small(folder: Path, sparsity: Any) -> Any:
    steps = {"num_steps": 8, "warmup_steps": 1, "decay_steps": 1, "save_steps": 4, "num_accumulated": 2}
    return build_config(read_yaml(write_config(folder, **steps, sparsity=sparsity)))


def matrices(run: Path) -> dict[str, torch.Tensor]:
    held = load_file(run / "model/model.safetensors")
    return {n: one for n, one in held.items() if ".layers." in n and one.dim() > 1 and ".router." not in n}


def test_a_share_is_left_and_resuming_is_exact(tmp_path: Path) -> None:
    config = small(tmp_path, FEWER)
    train(config, tmp_path / "whole", progress=False)
    found = matrices(tmp_path / "whole")
    left = sum(int(one.count_nonzero()) for one in found.values())
    assert left / sum(one.numel() for one in found.values()) == pytest.approx(0.25, abs=0.01)
    lines = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    told = [json.loads(line)["density"] for line in lines]
    assert told == sorted(told, reverse=True)
    assert told[-1] == pytest.approx(0.25, abs=0.001)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for gone in ("checkpoint-8", "model"):
        shutil.rmtree(tmp_path / "again" / gone)
    assert train(config, tmp_path / "again", progress=False).resumed_from == 4
    for name, one in found.items():
        assert torch.equal(one, matrices(tmp_path / "again")[name]), name
    shutil.rmtree(tmp_path / "again/checkpoint-8")
    (tmp_path / "again/checkpoint-4/masks.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no masks of this model"):
        train(config, tmp_path / "again", progress=False)


def test_what_comes_back_differs_from_what_stays_gone(tmp_path: Path) -> None:
    ends = {}
    for name in ("gra_net", "magnitude"):
        train(small(tmp_path, FEWER | {"name": name}), tmp_path / name, progress=False)
        ends[name] = {n: one != 0 for n, one in matrices(tmp_path / name).items()}
    assert any(not torch.equal(one, ends["magnitude"][n]) for n, one in ends["gra_net"].items())


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'gra_net'"):
        small(tmp_path, "granet")
    with pytest.raises(SettingError, match="density"):
        small(tmp_path, {"name": "magnitude", "density": 2.0})
    with pytest.raises(UserError, match="leave one of them out"):
        train(small(tmp_path, FEWER), tmp_path / "spread", progress=False, expert_parallel=2)
