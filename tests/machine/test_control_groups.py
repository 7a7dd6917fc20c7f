"""Limits of control groups of both versions, at every level, and those this process really has."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from memory_limit import limited

from mixtura.kernels.compiled import processors
from mixtura.machine.control_groups import memory_left, processor_quota

MIB = 1 << 20


def lay_out(root: Path, membership: str, files: Mapping[str, str]) -> tuple[Path, Path]:
    """A tree of groups, and the file that says which of them hold the process."""
    for name, text in files.items():
        path = root / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "mounted").mkdir(exist_ok=True)
    (root / "membership").write_text(membership)
    return root / "mounted", root / "membership"


TWO = "0::/outer/inner\n"
ONE = "5:cpu,cpuacct:/outer/inner\n4:memory:/outer\n3:cpuset:/other\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (TWO, {"outer/inner/cpu.max": "max 100000\n"}, None),
        (TWO, {"outer/inner/cpu.max": "150000 100000\n"}, 1.5),
        (TWO, {"outer/inner/cpu.max": "400000 100000\n", "outer/cpu.max": "50000 100000\n"}, 0.5),
        (TWO, {"cpu.max": "300000 100000\n"}, 3.0),
        (TWO, {"elsewhere/cpu.max": "100000 100000\n", "cpu.max": "nonsense"}, None),
        (ONE, {"cpu/outer/cpu.cfs_quota_us": "250000\n", "cpu/outer/cpu.cfs_period_us": "100000\n"}, 2.5),
        (ONE, {"cpu/outer/cpu.cfs_quota_us": "-1\n", "cpu/outer/cpu.cfs_period_us": "100000\n"}, None),
        (ONE, {"cpu/outer/inner/cpu.cfs_quota_us": "100000\n"}, None),
        ("", {"cpu.max": "100000 100000\n"}, None),
    ],
)
def test_the_least_quota_of_all_levels_holds(
    membership: str, files: Mapping[str, str], expected: float | None, tmp_path: Path
) -> None:
    assert processor_quota(*lay_out(tmp_path, membership, files)) == expected


def memory_files(folder: str, limit: str, use: int, cached: int, version: int = 2) -> dict[str, str]:
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    prefix = "" if version == 2 else "total_"
    stat = f"anon 1\n{prefix}inactive_file {cached}\n{prefix}active_file 0\n"
    return {
        f"{folder}{n}": text for n, text in zip((*names, "memory.stat"), (limit, str(use), stat), strict=True)
    }


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (TWO, {}, None),
        (TWO, memory_files("outer/inner/", "max\n", 5, 0), None),
        (TWO, memory_files("outer/inner/", "100\n", 60, 25), 65),
        (TWO, memory_files("outer/inner/", "100\n", 60, 0) | memory_files("outer/", "90\n", 70, 5), 25),
        (TWO, memory_files("outer/", "90\n", 99, 5), 0),
        (ONE, memory_files("memory/outer/", "100\n", 60, 25, version=1), 65),
        (ONE, memory_files("memory/", "100\n", 70, 0, version=1), 30),
        (ONE, memory_files("memory/other/", "100\n", 70, 0, version=1), None),
    ],
)
def test_the_least_memory_left_of_all_levels_holds(
    membership: str, files: Mapping[str, str], expected: int | None, tmp_path: Path
) -> None:
    assert memory_left(*lay_out(tmp_path, membership, files)) == expected


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert processor_quota(tmp_path / "none", tmp_path / "nothing") is None
    assert memory_left(tmp_path / "none", tmp_path / "nothing") is None


def test_this_process() -> None:
    quota = processor_quota()
    assert quota is None or quota > 0
    assert 1 <= processors() <= (os.cpu_count() or 1)
    with limited(100 * MIB) as run:
        done = run(
            [
                sys.executable,
                "-c",
                "from mixtura.machine.control_groups import memory_left; print(memory_left())",
            ]
        )
    assert done.returncode == 0, done.stderr
    assert 50 * MIB < int(done.stdout) < 100 * MIB
