"""A compression that is killed goes on to the same bytes; other settings are refused by name."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path

import pytest
from command_server import run_forked
from tiny_checkpoints import run_mixtura

pytestmark = pytest.mark.slow


def arguments(source: Path, text: Path, out: Path) -> list[str]:
    methods = ["--prune", "reap", "--keep", "0.5", "--quantize", "gptq", "--bits", "4"]
    return ["compress", str(source), *methods, "--text", str(text), "--tokens", "256", "--out", str(out)]


def digests(directory: Path) -> dict[str, str]:
    names = sorted(path for path in directory.rglob("*") if path.suffix in (".safetensors", ".json", ".md"))
    kept = [path for path in names if path.name != "compressed.json"]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


@pytest.fixture(scope="module")
def undisturbed(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run_mixtura(*arguments(source, text, out))
    assert done.returncode == 0, done.stderr
    return digests(out)


# Settings, the first layer observed; the second one; among rounded experts; among files that are written.
@pytest.mark.parametrize("moment", [2, 3, 7, 16])
def test_goes_on_to_the_same_bytes(
    moment: int, source: Path, text: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed = run_forked(arguments(source, text, out), killed_at=moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    assert (tmp_path / "out.work").is_dir()
    done = run_mixtura(*arguments(source, text, out))
    assert done.returncode == 0, done.stderr
    assert digests(out) == undisturbed
    assert not (tmp_path / "out.work").exists()


def test_other_settings_are_refused_by_name(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_forked(arguments(source, text, out), killed_at=3)
    others = [one if one != "0.5" else "0.75" for one in arguments(source, text, out)]
    done = run_mixtura(*others)
    assert done.returncode == 2
    assert "holds a compression begun with other settings (keep was 0.5, is now 0.75)" in done.stderr
