"""Places that a command is asked to write to, looked at before the long work begins."""

from __future__ import annotations

import os
from pathlib import Path

from mixtura.errors import OutputError


def check_file(target: Path | None) -> None:
    """Refuse a file that cannot be written; None is no file.

    Raises:
        OutputError: it is a directory, its directory is not there, or it may not be written.
    """
    if target is None:
        return
    if target.is_dir():
        raise OutputError(f"{target} is a directory; give the name of a file to write")
    if not target.parent.is_dir():
        raise OutputError(f"there is no directory {target.parent} to write {target.name} to; make it first")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise OutputError(f"{target} cannot be written; give a file in a directory of yours")


def check_folder(target: Path) -> None:
    """Refuse a directory that cannot be written or made.

    Raises:
        OutputError: it, or what it would lie in, is a file or may not be written.
    """
    nearest = next(one for one in (target, *target.absolute().parents) if one.exists())
    if not nearest.is_dir():
        raise OutputError(f"cannot write {target}: {nearest} is a file; give another directory")
    if not os.access(nearest, os.W_OK):
        raise OutputError(f"cannot write {target}: {nearest} is not writable; give a directory of yours")
