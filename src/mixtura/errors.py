"""Errors that say what is wrong, what was expected and what to do.

Every error a user can cause is a `UserError`; the command line prints its one sentence and exits
with the error's `exit_code`. Anything else is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar, final

# What was asked for is mistyped, missing or damaged: other words or files are needed.
EXIT_USER_ERROR = 2
# What was asked for is well formed and understood, but cannot be had: another limit is needed.
EXIT_UNMET = 3


class MixturaError(Exception):
    """Root of every error mixtura raises on purpose."""


class UserError(MixturaError, ValueError):
    """Something the user asked for cannot be done as asked; the message says what to do instead."""

    exit_code: ClassVar[int] = EXIT_USER_ERROR


class UnknownNameError(UserError, LookupError):
    """A name that does not exist, with the nearest ones that do."""

    def __init__(self, what: str, name: str, options: Iterable[str]) -> None:
        super().__init__(f"no {what} named {name!r}; {suggest(name, options)}")


class CheckpointError(UserError):
    """A model directory that cannot be read: missing, truncated, of the wrong shape or format."""


class UnsupportedModelError(UserError):
    """A model that is whole but that mixtura cannot work on, with the reason."""


class UnmetError(UserError):
    """A well-formed wish that no result meets, such as a limit on loss; scripts see another exit code."""

    exit_code: ClassVar[int] = EXIT_UNMET


class BudgetError(UnmetError):
    """A budget that cannot be met; the message says the smallest that can."""


class OutputError(UserError):
    """The output directory exists, cannot be written or is full."""


class SettingError(UserError):
    """A setting of a method or command that is unknown, of the wrong type or out of range."""


@final
class MixturaWarning(UserWarning):
    """Something a user should know of though the work goes on; the command line shows its sentence."""


def one_line(message: object, most: int = 2000) -> str:
    """A message without line breaks and other white space in a row, cut where it is very long.

    >>> one_line("a\\n  b")
    'a b'
    """
    line = " ".join(str(message).split())
    return line if len(line) <= most else line[:most] + "…"


def counted_names(names: Iterable[str], most: int = 3) -> str:
    """The first of some names, and how many more there are.

    >>> counted_names(["a", "b"]), counted_names("abcdef")
    ('a, b', 'a, b, c and 3 more')
    """
    every = list(names)
    rest = len(every) - most
    return ", ".join(every[:most]) + (f" and {rest} more" if rest > 0 else "")


def nearest(name: str, options: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """The options most like `name`, best first; empty where nothing is alike.

    >>> nearest("topk", ["top_k", "switch"])
    ('top_k',)
    """
    choices = list(options)
    lowered = {option.lower(): option for option in choices}
    matches = get_close_matches(name.lower(), list(lowered), n=count, cutoff=0.5)
    return tuple(lowered[match] for match in matches)


def suggest(name: str, options: Iterable[str]) -> str:
    """A clause that helps with a wrong name: the nearest names, else all of them.

    >>> suggest("topk", ["top_k", "switch"])
    "did you mean 'top_k'?"
    >>> suggest("zzz", ["top_k", "switch"])
    'there are: switch, top_k'
    """
    choices = sorted(options)
    close = nearest(name, choices)
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    if not choices:
        return "there are none"
    return "there are: " + ", ".join(choices)


def _bound(value: float) -> str:
    """A limit as people write it: without an exponent as long as that is short."""
    if isinstance(value, int) or (1000 <= abs(value) < 10**15 and value == int(value)):
        return str(int(value))
    return f"{value:g}"


def check_range(owner: str, name: str, value: float, low: float, high: float) -> None:
    """Raise `SettingError` unless `low <= value <= high`.

    >>> check_range("TopK", "top_k", 5, 1, 4)
    Traceback (most recent call last):
    ...
    mixtura.errors.SettingError: top_k of TopK must be in [1, 4], got 5
    """
    if not (low <= value <= high):
        raise SettingError(f"{name} of {owner} must be in [{_bound(low)}, {_bound(high)}], got {value!r}")
