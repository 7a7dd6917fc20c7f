"""What belongs together is all there: a kind's parts, a method's page and test; classes are plain."""

from __future__ import annotations

import ast
import re
import subprocess
from abc import ABC
from pathlib import Path

import pytest

from mixtura.authoring.contracts import checks
from mixtura.authoring.contracts.common import missing_sections
from mixtura.authoring.scaffold import test_file_name as file_of_test
from mixtura.methods import PACKAGE_DIR, Kind, base_class, header, kinds, own_names

ROOT = PACKAGE_DIR.parents[1]
KINDS = kinds()
METHODS = [(kind, name) for kind in KINDS for name in own_names(kind.name)]
MODULES = sorted(PACKAGE_DIR.rglob("*.py"))
# Of these a class is made to be derived from further, or cannot be.
OPEN_BASES = {"ABC", "Protocol", "NamedTuple", "TypedDict", "Enum", "StrEnum", "IntEnum"}
# Paths of somebody's machine.
MACHINE_PATHS = re.compile(r"(?<![\w.~-])/(?:root|home|Users|work|workspace|mnt)/[\w.]")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_kind_is_whole(kind: Kind) -> None:
    assert kind.summary.endswith(".")
    assert issubclass(base_class(kind.name), ABC)
    assert own_names(kind.name), "a kind has at least one method"
    assert any(check.__module__.endswith(f".{kind.name}") for check in checks(kind.name))
    for check in checks(kind.name):
        assert (check.__doc__ or "").splitlines()[0].endswith("."), f"{check.__name__} needs a sentence"


@pytest.mark.parametrize(("kind", "name"), METHODS, ids=lambda value: getattr(value, "name", value))
def test_a_method_is_whole(kind: Kind, name: str) -> None:
    assert (ROOT / "docs/methods" / kind.name / f"{name}.md").is_file(), "python -m mixtura.authoring.docs"
    test = ROOT / "tests" / "methods" / kind.name / file_of_test(kind, name)
    assert test.is_file(), f"its own test belongs in {test.relative_to(ROOT)}"
    assert missing_sections(header(kind.name, name)) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE_DIR)))
def test_a_class_is_abstract_or_final(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            marks = {ast.unparse(mark).rpartition(".")[2] for mark in node.decorator_list}
            bases = {re.sub(r"\[.*", "", ast.unparse(base)).rpartition(".")[2] for base in node.bases}
            open_or_error = bases & OPEN_BASES or node.name.endswith("Error")
            assert "final" in marks or open_or_error, f"{node.name} is neither abstract nor final"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE_DIR)))
def test_a_module_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module starts with what it is for"
    first = next((node for node in tree.body if isinstance(node, ast.ImportFrom)), None)
    if len(tree.body) > 1:
        assert first is not None
        assert first.module == "__future__", "a module's first import is annotations from __future__"


def test_no_file_names_a_path_of_a_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    found = []
    for name in listed:
        path = ROOT / name
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        found += [f"{name}: {match.group()}" for match in MACHINE_PATHS.finditer(text)]
    assert not found
