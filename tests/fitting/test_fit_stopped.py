"""A fit that is killed goes on to the same bytes, and never touches its source."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_checkpoints import run_mixtura

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-c", "from mixtura.cli import main; main()"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def digests(directory: Path, *, of_result: bool = True) -> dict[str, str]:
    """Digest of every file; of a result, of those that must be the same every time."""
    names = sorted(path for path in directory.rglob("*") if path.is_file())
    if of_result:
        names = [p for p in names if p.suffix in (".safetensors", ".json") and p.name != "measured.json"]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


@pytest.fixture(scope="module")
def source(tiny_fit: tuple[Path, Path, dict]) -> Path:
    return tiny_fit[0]


@pytest.fixture(scope="module")
def undisturbed(tiny_fit: tuple[Path, Path, dict]) -> dict[str, str]:
    return digests(tiny_fit[1])


def stop_when(source: Path, out: Path, reached: str, how: signal.Signals) -> int:
    """Start a fit and send it a signal as soon as it says it has reached a step."""
    process = subprocess.Popen(
        [*COMMAND, "fit", str(source), "--out", str(out)],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if reached in line:
            time.sleep(0.2)
            process.send_signal(how)
            break
    process.communicate()
    return process.returncode


@pytest.mark.parametrize(
    ("reached", "how"),
    [
        ("observing and pricing", signal.SIGKILL),
        ("writing the model", signal.SIGKILL),
        ("generating with the chosen", signal.SIGKILL),
        ("uniform 4 bit", signal.SIGINT),
    ],
)
def test_goes_on_to_the_same_bytes(
    source: Path, undisturbed: dict[str, str], tmp_path: Path, reached: str, how: signal.Signals
) -> None:
    before = digests(source, of_result=False)
    out = tmp_path / "out"
    code = stop_when(source, out, reached, how)
    assert code == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    assert not out.exists()
    done = run_mixtura("fit", str(source), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert digests(out) == undisturbed
    assert not out.with_name("out.work").exists()
    assert digests(source, of_result=False) == before


def test_other_settings_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_when(source, out, "observing and pricing", signal.SIGKILL)
    done = run_mixtura("fit", str(source), "--out", str(out), "--context", "32")
    assert done.returncode == 2
    assert "context was 64, is now 32" in done.stderr
    done = run_mixtura("fit", str(source), "--out", str(out), env={"OMP_NUM_THREADS": "2"})
    assert done.returncode == 2
    assert "threads was 1, is now 2" in done.stderr
