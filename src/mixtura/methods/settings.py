"""Settings of a method: the keyword-only arguments of its constructor, checked by name and type."""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mixtura.errors import SettingError, check_range, suggest

N = TypeVar("N", int, float)


class Ranged(ABC):  # noqa: B024 - it leaves nothing open, but is no method
    """A method that takes a setting's value where it keeps it, if the value is in range."""

    def within(self, name: str, value: N, low: float, high: float) -> N:
        """A setting's value, if it is in the range.

        Raises:
            SettingError: it is not.
        """
        check_range(type(self).__name__, name, value, low, high)
        return value


def settings(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """A method's settings: the keyword-only parameters of its constructor, by name."""
    parameters = inspect.signature(cls).parameters
    return {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def construct(cls: type[Any], /, *args: Any, **given: Any) -> Any:
    """Construct a method from its class, with its settings checked by name and type first.

    A class whose constructor may only store settings checks them in a method ``check_settings``.

    Raises:
        SettingError: a setting is unknown, of the wrong type or out of range.
    """
    allowed = settings(cls)
    wanted = get_type_hints(cls.__init__)
    for setting, value in given.items():
        if setting not in allowed:
            raise SettingError(f"{cls.__name__} has no setting {setting!r}; {suggest(setting, allowed)}")
        if not fits(value, wanted.get(setting, Any)):
            expected = allowed[setting].annotation
            raise SettingError(f"{setting} of {cls.__name__} must be {expected}, got {value!r}")
    made = cls(*args, **{name: as_plain(value) for name, value in given.items()})
    check = getattr(made, "check_settings", None)
    if check is not None:
        check()
    return made


def as_plain(value: Any) -> Any:
    """A setting with numbers of Python in the place of numpy's, which JSON does not know.

    >>> import numpy as np
    >>> as_plain({"ranks": [np.int64(3), 0.5, "all"]})
    {'ranks': [3, 0.5, 'all']}
    """
    if type(value) in (list, tuple):
        return type(value)(map(as_plain, value))
    if type(value) is dict:
        return {as_plain(key): as_plain(held) for key, held in value.items()}
    if isinstance(value, bool | int | float) and type(value).__module__ != "numpy":
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of a type as a setting's annotation writes it; an int fits a float.

    Numbers are told by what they are, so that those of numpy are numbers, too.

    >>> fits(3, float), fits(True, int), fits("a", Literal["a", "b"]), fits(None, int | None)
    (True, False, True, True)
    """
    origin = get_origin(wanted)
    if wanted is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in get_args(wanted))
    if origin is Literal:
        return value in get_args(wanted)
    if isinstance(value, bool) and wanted in (int, float):
        return False
    if wanted is float:
        return isinstance(value, Real)
    if wanted is int:
        return isinstance(value, Integral)
    plain = origin or wanted
    if not isinstance(plain, type):
        return True
    return isinstance(value, plain) and _parts_fit(value, plain, get_args(wanted))


def _parts_fit(value: Any, plain: type[Any], parts: tuple[Any, ...]) -> bool:
    """Whether what a list, tuple or mapping holds is of the types it is written with."""
    if not parts:
        return True
    if issubclass(plain, Mapping):
        return all(fits(key, parts[0]) and fits(held, parts[1]) for key, held in value.items())
    if plain is tuple and parts[-1] is not Ellipsis:
        return len(value) == len(parts) and all(map(fits, value, parts))
    if issubclass(plain, Sequence):
        return all(fits(held, parts[0]) for held in value)
    return True


def key_and_value(change: str) -> tuple[str, str]:
    """The two sides of a setting that is written ``key=value``.

    >>> key_and_value("beta = 0.5")
    ('beta', ' 0.5')

    Raises:
        SettingError: it has no key.
    """
    key, separator, value = change.partition("=")
    if not separator or not key.strip():
        raise SettingError(f"a setting is written key=value, got {change!r}")
    return key.strip(), value
