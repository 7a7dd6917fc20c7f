"""Settings of methods as a command line writes them: ``key=value``, values as JSON has them, or words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mixtura.methods.settings import key_and_value


def parse_settings(changes: Sequence[str]) -> dict[str, Any]:
    """The settings that ``key=value`` pairs give.

    >>> parse_settings(["beta=0.5", "experts=[[0, 3]]", "choice=vote"])
    {'beta': 0.5, 'experts': [[0, 3]], 'choice': 'vote'}

    Raises:
        SettingError: a pair has no key.
    """
    found: dict[str, Any] = {}
    for change in changes:
        key, value = key_and_value(change)
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
