"""Commands' threads sleep while they wait, whatever the command, unless the user says otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoints import run_fresh

COMMANDS = {
    "observe": ("observe", "no/such/model"),
    "arena": ("arena", "routers", "--only", "nothing"),
    "train": ("train", "train.yaml", "--out", "out"),
    "check": ("check", "cache", "lru"),
}


def policy(arguments: tuple[str, ...], **own: str) -> str:
    """What OpenMP says of itself when a command loads PyTorch."""
    done = run_fresh(*arguments, env={"OMP_DISPLAY_ENV": "TRUE"} | own)
    return next(line for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line).upper()


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_wait_without_spinning(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text("data: {text: no/such/text}\n")
    assert "PASSIVE" in policy(COMMANDS[name])


def test_the_user_decides() -> None:
    assert "ACTIVE" in policy(COMMANDS["check"], OMP_WAIT_POLICY="ACTIVE")
