"""What the control groups of Linux grant this process: of memory, and of the processors' time.

Groups are nested, and every one of them may have a limit. Both versions are read: in version 2 one folder
holds a group's limits of every kind, in version 1 each kind (controller) has folders of its own. Where a
process sees only its own group's folder, as in a container, limits further out are not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
# By version: limit and use of memory; quota and period of the processors' time.
_MEMORY_FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
_QUOTA_FILES = {1: ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2: ("cpu.max",)}
_CACHED = ("inactive_file", "active_file")


def memory_left(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Bytes that this process can still take under every limit; None where there is none.

    Files that a group holds in memory count as left: they would be given up.

    Args:
        root: where control groups are mounted.
        membership: the file that names this process's groups.
    """
    left = [
        _memory_left(folder, *_MEMORY_FILES[version])
        for version, folder in _groups("memory", root, membership)
    ]
    return min((one for one in left if one is not None), default=None)


def processor_quota(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> float | None:
    """Processors' worth of time that every group grants this process; None where none has a limit.

    Args:
        root: where control groups are mounted.
        membership: the file that names this process's groups.
    """
    quotas = [_quota(folder, _QUOTA_FILES[version]) for version, folder in _groups("cpu", root, membership)]
    return min((one for one in quotas if one is not None), default=None)


def _groups(controller: str, root: Path, membership: Path) -> Iterator[tuple[int, Path]]:
    """Version and folder of every group that holds this process, from its own outwards."""
    for line in _read(membership).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        # Version 1 links a controller's name to the folder it shares with others.
        top = root / controller if version == 1 else root
        place = top / group.lstrip("/")
        for folder in (place, *place.parents):
            if folder == top or top in folder.parents:
                yield version, folder


def _memory_left(folder: Path, limit: str, use: str) -> int | None:
    try:
        room = int(_read(folder / limit)) - int(_read(folder / use))
        fields = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
        cached = sum(int(fields.get(f"total_{name}", fields.get(name, 0))) for name in _CACHED)
    except ValueError:  # No such files, or "max": no limit.
        return None
    return max(0, room + cached)


def _quota(folder: Path, files: tuple[str, ...]) -> float | None:
    words = " ".join(_read(folder / name) for name in files).split()
    try:
        quota, period = (int(word) for word in words)
    except ValueError:  # No such files, or "max": no limit.
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    """A small file's text; empty where there is none."""
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
