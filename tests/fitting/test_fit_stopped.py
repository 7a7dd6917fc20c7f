"""A fit that is killed goes on to the same bytes, and never touches its source."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path

import pytest
from command_server import run_forked, stopped_when
from tiny_checkpoints import run_mixtura

pytestmark = pytest.mark.slow


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


def test_goes_on_to_the_same_bytes_however_often_it_is_stopped(
    source: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    before = digests(source, of_result=False)
    out = tmp_path / "out"
    command = ["fit", str(source), "--out", str(out)]
    for reached, how in (("observing and pricing", signal.SIGKILL), ("uniform 4 bit", signal.SIGINT)):
        code = stopped_when(command, reached, how)
        assert code == (-signal.SIGKILL if how == signal.SIGKILL else 130), reached
        assert not out.exists()
        assert digests(source, of_result=False) == before
        if reached == "observing and pricing":
            other_settings_are_refused_by_name(command)
    # What is left takes less than a moment: killed as it renames what it wrote.
    for moment in (1, 2, 3):
        assert run_forked(command, killed_at=moment).returncode == -signal.SIGKILL, moment
        assert not out.exists()
        assert digests(source, of_result=False) == before
    done = run_mixtura(*command)
    assert done.returncode == 0, done.stderr
    assert digests(out) == undisturbed
    assert not out.with_name("out.work").exists()
    assert digests(source, of_result=False) == before


def other_settings_are_refused_by_name(command: list[str]) -> None:
    done = run_mixtura(*command, "--context", "32")
    assert done.returncode == 2
    assert "context was 64, is now 32" in done.stderr
    done = run_mixtura(*command, env={"OMP_NUM_THREADS": "2"})
    assert done.returncode == 2
    assert "threads was 1, is now 2" in done.stderr
