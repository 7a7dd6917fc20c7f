"""`mixtura train --expert-parallel`: as data parallelism trains, resumable, and ended in one sentence."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from train.train_runs import finish, start, write_config

from mixtura.errors import UserError
from mixtura.train.spread import check_size, lost_touch

STEPS = {"num_steps": 4, "save_steps": 2, "warmup_steps": 1, "decay_steps": 1, "log_steps": 1}


def kill_rank(process: subprocess.Popen[str], rank: int, path: Path) -> None:
    """Kill one of a training's processes as soon as a file is there."""
    deadline = time.monotonic() + 250
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            child.kill()


def optimizer_of(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    return found


@pytest.mark.slow
def test_spread_experts_train_as_copies_do_and_go_on_when_killed(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, **STEPS))
    plain, spread, killed = (tmp_path / name for name in ("plain", "spread", "killed"))
    code, _, err = finish(start(config, "--out", str(plain), processes=2))
    assert code == 0, err
    code, out, err = finish(start(config, "--out", str(spread), "--expert-parallel", "2"))
    assert code == 0, err
    assert out.count("the model is in") == 1
    one, other = (load_file(run / "model/model.safetensors") for run in (plain, spread))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            other[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    # Checkpoints do not know how many processes there were: an optimizer's states are whole.
    states = [optimizer_of(run / "checkpoint-2")["state"] for run in (plain, spread)]
    for number, kept in states[0].items():
        for key, value in kept.items():
            torch.testing.assert_close(states[1][number][key], value, rtol=1e-3, atol=1e-6)

    process = start(config, "--out", str(killed), "--expert-parallel", "2")
    kill_rank(process, 1, killed / "checkpoint-2")
    code, _, err = finish(process)
    assert code == 3, err
    assert "process 1 of 2 was ended by SIGKILL" in err
    assert "goes on from the last checkpoint" in " ".join(err.split())
    assert "Traceback" not in err
    code, _, err = finish(start(config, "--out", str(killed), "--expert-parallel", "2"))
    assert code == 0, err
    again = load_file(killed / "model/model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in other.items())


def test_a_number_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_size(2)
    with pytest.raises(UserError, match="--expert-parallel 3 does not divide the 4 processes"):
        check_size(3)


def test_which_errors_say_that_a_process_is_gone() -> None:
    assert lost_touch(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert lost_touch(RuntimeError("Timed out waiting 600000ms for recv operation to complete"))
    assert not lost_touch(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
