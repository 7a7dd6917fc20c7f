"""What every method promises, whatever its kind."""

from __future__ import annotations

import doctest
import json
import math
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

from mixtura.authoring.contracts._compare import random_state, same
from mixtura.authoring.contracts._core import Subject, checks, require
from mixtura.errors import SettingError
from mixtura.methods import Header
from mixtura.methods.settings import settings

_SECTIONS = ("Shapes", "Example")
_SECTIONS_OF_A_PAPER = ("Differences from the paper", "Reference")
_NOTHING = re.compile(r"(none|nothing)( of its own)?\.?", re.IGNORECASE)
_DOCTEST_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def check_header(method: Subject) -> None:
    """The header names a title, and gaps of checks that exist."""
    require(method.header.title, "METHOD needs a title")
    known = {check.__name__ for check in checks(method.header.kind)}
    for gap in method.header.gaps:
        require(gap in known, f"METHOD's gaps name {gap!r}, which is no check of {method.header.kind}")


def check_class_is_final(method: Subject) -> None:
    """The class is marked final: another method is another file, not a subclass."""
    require(getattr(method.cls, "__final__", False), "the class needs @typing.final")


def check_docstring_sections(method: Subject) -> None:
    """The docstring says in one line what the method does, and has every section that it has use for."""
    written = method.header.sections
    require(written[""].splitlines()[:1], "the class needs a docstring whose first line says what it does")
    missing = missing_sections(method.header)
    empty = [name for name, text in written.items() if _NOTHING.fullmatch(text)]
    require(not empty, f"the docstring has sections that say nothing: {', '.join(empty)}; leave them out")
    require(not missing, f"the docstring lacks the sections {', '.join(missing)}")


def missing_sections(found: Header) -> list[str]:
    """The sections that a method's docstring needs and lacks.

    Those of papers where there is one, and ``Raises`` where a setting may be out of range.
    """
    needed = list(_SECTIONS)
    if found.paper is not None:
        needed += _SECTIONS_OF_A_PAPER
    if any(setting.name != "seed" and setting.type != "bool" for setting in found.settings):
        needed.append("Raises")
    return [name for name in needed if not found.sections.get(name)]


def check_doctest(method: Subject) -> None:
    """The docstring's example runs and prints what it says."""
    scope = dict(vars(sys.modules[method.cls.__module__]))
    example = doctest.DocTestParser().get_doctest(
        method.cls.__doc__ or "", scope, method.cls.__name__, str(method.header.path), 0
    )
    require(any(step.want for step in example.examples), "the docstring needs an example with a result")
    said: list[str] = []
    results = doctest.DocTestRunner(optionflags=_DOCTEST_FLAGS).run(example, out=said.append)
    require(results.failed == 0, "the docstring's example fails: " + " ".join("".join(said).split()[-40:]))


def check_import_is_quiet(method: Subject) -> None:
    """Importing the file opens no connection and draws no global random number."""
    before = random_state()
    spec = spec_from_file_location("_mixtura_quiet_import", method.header.path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        with _no_network():
            spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    require(same(before, random_state()), "importing the file changes a global random generator")


def check_settings_have_defaults(method: Subject) -> None:
    """Every setting is keyword-only, typed, and has a default; the file's text shows the same ones."""
    method.create()
    actual = settings(method.cls)
    for name, parameter in actual.items():
        require(parameter.default is not parameter.empty, f"setting {name} needs a default")
        require(parameter.annotation is not parameter.empty, f"setting {name} needs a type")
    written = {setting.name for setting in method.header.settings}
    require(set(actual) == written, "settings must be written in the class's own __init__")


def check_settings_are_stored(method: Subject) -> None:
    """Settings are kept under their own names and survive JSON, so that a method can be made again."""
    made = method.create()
    values = {}
    for name, parameter in settings(method.cls).items():
        require(hasattr(made, name), f"setting {name} must be stored as attribute {name}")
        stored = getattr(made, name)
        require(same(stored, parameter.default), f"setting {name} is stored as {stored!r}, not as given")
        values[name] = stored
    read = json.loads(json.dumps(values))
    again = method.create(**read)
    for name, value in values.items():
        require(same(getattr(again, name), value), f"setting {name} does not survive JSON")


def check_bad_settings_are_refused(method: Subject) -> None:
    """A value of the wrong type or out of range raises `SettingError` that names the setting."""
    for name, parameter in settings(method.cls).items():
        _require_refused(method, name, [{"no": "setting"}])
        if isinstance(parameter.default, float):
            _require_refused(method, name, [math.nan])
        elif isinstance(parameter.default, int) and not isinstance(parameter.default, bool):
            # A seed may be any number; every other number has an end.
            if name != "seed":
                _require_refused(method, name, [-(10**9), 10**9])
        elif isinstance(parameter.default, str):
            _require_refused(method, name, ["no such choice"])


def check_same_input_same_result(method: Subject) -> None:
    """Made again and used again on the same input, the method gives the same result."""
    first, second = (_used(method, seed=1)[0] for _ in range(2))
    require(same(first, second), "two runs on the same input differ")


def check_inputs_are_unchanged(method: Subject) -> None:
    """What a method is given is as it was afterwards."""
    _, given = _used(method, seed=2)
    untouched = method.contract.sample(method, 2)
    require(same(given, untouched), "the method changed its input in place")


def check_global_randomness_is_untouched(method: Subject) -> None:
    """Constructing and using a method draws no global random number."""
    before = random_state()
    _used(method, seed=3)
    require(same(before, random_state()), "the method draws from a global random generator")


def _used(method: Subject, seed: int) -> tuple[Any, Any]:
    """The result of a newly made method on a sample, and the sample afterwards."""
    given = method.contract.sample(method, seed)
    return method.contract.use(method.create(), given), given


def _require_refused(method: Subject, name: str, values: list[Any]) -> None:
    """At least one of ``values`` is refused, by name."""
    for value in values:
        try:
            method.create(**{name: value})
        except SettingError as error:
            require(name in str(error), f"the error for a bad {name} must name it, got: {error}")
            return
    tried = " or ".join(map(repr, values))
    require(False, f"setting {name} accepts {tried}; it must raise SettingError (see errors.check_range)")


@contextmanager
def _no_network() -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        require(False, "importing the file opens a network connection")

    kept = socket.socket.connect, socket.getaddrinfo
    socket.socket.connect = socket.getaddrinfo = refuse  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        socket.socket.connect, socket.getaddrinfo = kept  # type: ignore[method-assign]
