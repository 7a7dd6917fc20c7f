"""Finding a kind's checks and running them on a method."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, final

from mixtura.methods import Header, header, kind, load_method
from mixtura.methods.settings import construct


class ContractError(AssertionError):
    """A method does not keep a promise of its kind; the message says which and how."""


def require(kept: object, why: str) -> None:
    """Raise `ContractError` unless a promise is kept."""
    if not kept:
        raise ContractError(why)


@final
@dataclass(frozen=True, slots=True)
class Subject:
    """The method under a contract."""

    header: Header
    cls: type[Any]

    @property
    def contract(self) -> ModuleType:
        """The module of its kind's checks."""
        return import_module(f"mixtura.authoring.contracts.{self.header.kind}")

    def create(self, **settings: Any) -> Any:
        """The method constructed as its kind is, with some settings other than the default.

        Raises:
            SettingError: a setting is unknown, of the wrong type or out of range.
        """
        of_this: Callable[[Subject], tuple[Any, ...]] | None = getattr(self.contract, "arguments_of", None)
        given = self.contract.arguments() if of_this is None else of_this(self)
        return construct(self.cls, *given, **settings)

    def has(self, tag: str) -> bool:
        """Whether the method carries a tag."""
        return tag in self.header.tags

    def tagged(self, prefix: str) -> tuple[str, ...]:
        """What follows ``prefix:`` in the method's tags."""
        return tuple(t.removeprefix(f"{prefix}:") for t in self.header.tags if t.startswith(f"{prefix}:"))


Check = Callable[[Subject], None]
_SLOW: set[Check] = set()


def slow(check: Check) -> Check:
    """Mark a check that takes more than a few seconds, so that quick runs leave it out."""
    _SLOW.add(check)
    return check


def is_slow(check: Check) -> bool:
    """Whether a check takes more than a few seconds."""
    return check in _SLOW


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one check: ``gap`` is a known failure, ``stale gap`` one that no longer fails."""

    check: str
    status: Literal["pass", "fail", "gap", "stale gap"]
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether this is as the method's file says it should be."""
        return self.status in ("pass", "gap")


def subject(kind_name: str, name: str) -> Subject:
    """The method to check, by kind and name or by the path of its file.

    Raises:
        UserError: there is no such method, or it cannot be imported.
    """
    return Subject(header(kind_name, name), load_method(kind_name, name))


def checks(kind_name: str) -> tuple[Check, ...]:
    """The checks of a kind: first those of all kinds, then its own, each in the order they are written.

    A kind with more than fit one file names the others' modules in ``MORE``.
    """
    common, own = (
        import_module(f"mixtura.authoring.contracts.{name}") for name in ("common", kind(kind_name).name)
    )
    modules = (common, own, *getattr(own, "MORE", ()))
    return tuple(
        item
        for module in modules
        for name, item in vars(module).items()
        if name.startswith("check_") and item.__module__ == module.__name__
    )


def run(kind_name: str, name: str, only: Collection[str] = (), *, quick: bool = False) -> tuple[Outcome, ...]:
    """Run a kind's contract on one method: all its checks, or those named in ``only``.

    With ``quick`` slow checks are left out.

    Raises:
        UserError: there is no such method, or it cannot be imported.
    """
    method = subject(kind_name, name)
    asked = [check for check in checks(kind_name) if not only or check.__name__ in only]
    wanted = [check for check in asked if not (quick and is_slow(check))]
    return tuple(_run_one(check, method) for check in wanted)


def _run_one(check: Check, method: Subject) -> Outcome:
    known = method.header.gaps.get(check.__name__)
    try:
        check(method)
    except Exception as error:
        if known is not None:
            return Outcome(check.__name__, "gap", known)
        return Outcome(check.__name__, "fail", _reason(error))
    if known is not None:
        return Outcome(check.__name__, "stale gap", "it passes now: take it out of gaps")
    return Outcome(check.__name__, "pass")


def _reason(error: Exception) -> str:
    """One line on why a check failed."""
    text = " ".join(str(error).split())
    if isinstance(error, ContractError):
        return text
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({where.filename}:{where.lineno})"
