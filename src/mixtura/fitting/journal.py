"""What a fit has measured so far, kept so that an interrupted one goes on instead of starting over.

The journal is a directory beside the output. It holds the settings it was begun with, every
measurement as one line, and the larger records (trace, prices, reference) as files written aside
and renamed. A line cut off by a crash is ignored.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError

from mixtura.errors import OutputError

_SETTINGS = "settings.json"
_LINES = "measured.jsonl"
_LOCK = "lock"
_NO_SPACE = os.strerror(errno.ENOSPC)


@final
@dataclass(frozen=True, slots=True)
class Journal:
    """The journal of one fit. Open one with `open_journal`."""

    directory: Path

    def path(self, name: str) -> Path:
        """Where the journal keeps a larger record."""
        return self.directory / name

    def write(self, name: str, save: Any) -> Path:
        """Have ``save(path)`` write a larger record aside, and rename it when it is whole."""
        final_path = self.path(name)
        aside = final_path.with_name(final_path.name + ".aside")
        save(aside)
        os.replace(aside, final_path)
        return final_path

    def note(self, key: str, value: Mapping[str, Any]) -> None:
        """Keep a measurement under a key, on disk before this returns."""
        line = json.dumps({"key": key, "value": dict(value)}, sort_keys=True)
        with self.path(_LINES).open("a", encoding="utf-8") as file:
            # The line starts on its own even where a crash cut the one before it off.
            file.write(f"\n{line}\n")
            file.flush()
            os.fsync(file.fileno())

    def notes(self) -> dict[str, dict[str, Any]]:
        """Every measurement kept, by key."""
        found: dict[str, dict[str, Any]] = {}
        path = self.path(_LINES)
        if not path.is_file():
            return found
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[entry["key"]] = entry["value"]
        return found


@contextmanager
def open_journal(
    directory: Path,
    settings: Mapping[str, Any],
    what: str = "fit",
    may_differ: str = " (the budget and --max-kl may differ)",
) -> Iterator[Journal]:
    """Begin or continue a journal of a fit or of other work; only one process at a time may.

    Args:
        directory: where it is kept.
        settings: what must be the same for it to be continued.
        what: the work, in a word.
        may_differ: which settings need not be the same, in brackets.

    Raises:
        OutputError: it cannot be written, another process is using it, or it was begun with other
            settings.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / _LOCK).open("w")
    except OSError as error:
        raise OutputError(
            f"cannot write to {directory.parent}: {error.strerror}; choose another place with --out"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise OutputError(
            f"another mixtura is writing to {directory}; wait for it or choose another --out"
        ) from None
    try:
        _check_settings(directory, settings, what, may_differ)
        yield Journal(directory)
    except (OSError, SafetensorError) as error:
        if _NO_SPACE not in str(error):
            raise
        raise OutputError(
            f"the disk of {directory.parent} is full; free some space and give the same command again to "
            f"continue, or choose another place with --out"
        ) from None
    finally:
        lock.close()


def _check_settings(directory: Path, settings: Mapping[str, Any], what: str, may_differ: str) -> None:
    path = directory / _SETTINGS
    wanted = json.loads(json.dumps(dict(settings)))
    if not path.is_file():
        aside = path.with_suffix(".aside")
        aside.write_text(json.dumps(wanted, indent=1, sort_keys=True), encoding="utf-8")
        os.replace(aside, path)
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    differing = sorted(key for key in {*begun, *wanted} if begun.get(key) != wanted.get(key))
    if differing:
        told = "; ".join(f"{key} was {begun.get(key)}, is now {wanted.get(key)}" for key in differing)
        raise OutputError(
            f"{directory} holds a {what} begun with other settings ({told}); repeat the first settings to "
            f"continue it{may_differ}, delete that directory to start over, or choose another --out"
        )
