"""Settings of methods as a command line writes them: ``key=value``, values as JSON has them, or words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mixtura.errors import SettingError


def parse_settings(changes: Sequence[str]) -> dict[str, Any]:
    """The settings that ``key=value`` pairs give.

    >>> parse_settings(["beta=0.5", "experts=[[0, 3]]", "choice=vote"])
    {'beta': 0.5, 'experts': [[0, 3]], 'choice': 'vote'}

    Raises:
        SettingError: a pair has no key.
    """
    found: dict[str, Any] = {}
    for change in changes:
        key, separator, value = change.partition("=")
        if not separator or not key.strip():
            raise SettingError(f"a setting is written key=value, got {change!r}")
        try:
            found[key.strip()] = json.loads(value)
        except ValueError:
            found[key.strip()] = value
    return found
