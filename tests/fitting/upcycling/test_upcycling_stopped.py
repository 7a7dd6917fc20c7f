"""A composition that is killed goes on to the same bytes; other settings are refused by name."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path

import pytest
from command_server import run_forked
from tiny_checkpoints import run_mixtura

pytestmark = pytest.mark.slow


def arguments(dense: tuple[Path, ...], prompts: Path, text: Path, out: Path) -> list[str]:
    models = [str(path) for path in dense]
    more = ["--method", "dume", "--prompts", str(prompts), "--text", str(text), "--top-k", "1"]
    return ["compose", *models, *more, "--length", "64", "--out", str(out)]


def digests(directory: Path) -> dict[str, str]:
    names = sorted(path for path in directory.iterdir() if path.name != "upcycled.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


@pytest.fixture(scope="module")
def undisturbed(
    dense: tuple[Path, ...], prompts: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run_mixtura(*arguments(dense, prompts, text, out))
    assert done.returncode == 0, done.stderr
    return digests(out)


# While the plan is kept; among files that are written; when all is written and tried.
@pytest.mark.parametrize("moment", [2, 5, 10])
def test_goes_on_to_the_same_bytes_after_a_kill(
    moment: int,
    dense: tuple[Path, ...],
    prompts: Path,
    text: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    own = arguments(dense, prompts, text, out)
    killed = run_forked(own, killed_at=moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    assert (tmp_path / "out.work").is_dir()
    if moment == 2:
        others = [one if one != "1" else "2" for one in own]
        refused = run_mixtura(*others)
        assert refused.returncode == 2
        assert "holds a conversion begun with other settings (top_k was 1, is now 2)" in refused.stderr
    done = run_mixtura(*own)
    assert done.returncode == 0, done.stderr
    assert digests(out) == undisturbed
    assert not (tmp_path / "out.work").exists()
