"""Trainings in processes of their own, on a text of a few pages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from command_server import Forked

MIXTURA = str(Path(sys.executable).with_name("mixtura"))


def write_text(folder: Path) -> Path:
    """Numbered lines: text enough for sequences of 32 tokens."""
    file = folder / "text/lines.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(f"line {n} holds {n * n} and {n * 7 % 13} words\n" for n in range(600)))
    return file


def write_config(folder: Path, **training: Any) -> Path:
    """A model with everything that a resumed training could get wrong: noise, dropout, a bias."""
    moe = {
        "router": {"name": "noisy_top_k", "top_k": 2},
        "num_experts": 4,
        "d_expert": 16,
        "balancers": ["switch_loss"],
    }
    biased = {"router": {"name": "top_k", "top_k": 2}, "balancers": ["loss_free", "z_loss"]}
    config = {
        "model": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "attention_dropout": 0.1,
            "tie_word_embeddings": True, "moe": moe, "layers": [None, biased],
        },
        "data": {"text": str(write_text(folder)), "sequence_length": 32},
        "training": {
            "num_steps": 12, "num_sequences": 2, "num_accumulated": 2, "warmup_steps": 2, "decay_steps": 4,
            "save_steps": 3, "log_steps": 2, **training,
        },
    }  # fmt: skip
    file = folder / "train.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def start(*arguments: str, processes: int = 1, fresh: bool = False) -> Forked | subprocess.Popen[str]:
    """Start `mixtura train`, under torchrun where there are several processes.

    One process is forked from a server unless a fresh one is asked for.
    """
    training = ["train", *arguments, "--threads", "1"]
    if processes == 1 and not fresh and "--expert-parallel" not in arguments:
        return Forked(training)
    command = [MIXTURA, *training]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
        command = [*torchrun, f"--nproc-per-node={processes}", *command]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: Forked | subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a training: its exit code and what it said."""
    out, err = process.communicate(timeout=300)
    assert process.returncode is not None
    return process.returncode, out, err


def kill_when(process: Forked | subprocess.Popen[str], path: Path) -> None:
    """Kill a training as soon as a file is there."""
    deadline = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
