"""Numbers measured once on a machine and kept in the user's cache directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_kept(name: str) -> dict[str, Any]:
    """What `keep` wrote under this name; empty where there is nothing or it cannot be read."""
    try:
        known = json.loads(_path(name).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return known if isinstance(known, dict) else {}


def keep(name: str, values: dict[str, Any]) -> None:
    """Write the file whole; where that is not allowed the next process measures again."""
    path = _path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.aside")
        aside.write_text(json.dumps(values, indent=1), encoding="utf-8")
        os.replace(aside, path)
    except OSError:
        return


def _path(name: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mixtura" / f"{name}.json"
