"""What belongs together is all there: a kind's parts, a method's page and test; classes are plain."""

from __future__ import annotations

import ast
import re
import subprocess
from abc import ABC
from pathlib import Path

import pytest
from sources import MODULES, name_of, nodes_of, tree_of

from mixtura.authoring.contracts import checks
from mixtura.authoring.contracts.common import missing_sections
from mixtura.authoring.scaffold import test_file_name as file_of_test
from mixtura.methods import PACKAGE_DIR, Kind, base_class, header, kinds, own_names

ROOT = PACKAGE_DIR.parents[1]
KINDS = kinds()
METHODS = [(kind, name) for kind in KINDS for name in own_names(kind.name)]
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


def missing_of(kind: Kind, name: str) -> list[str]:
    """What belongs to a method and is not there."""
    page = ROOT / "docs/methods" / kind.name / f"{name}.md"
    test = ROOT / "tests" / "methods" / kind.name / file_of_test(kind, name)
    files = [f"{path.relative_to(ROOT)} is missing" for path in (page, test) if not path.is_file()]
    return files + [f"{kind.name}/{name}: {one}" for one in missing_sections(header(kind.name, name))]


def test_methods_are_whole() -> None:
    # Pages are written by: python -m mixtura.authoring.docs
    assert [found for kind, name in METHODS for found in missing_of(kind, name)] == []


def open_classes(path: Path) -> list[str]:
    """The classes of a file that are neither abstract nor final."""
    found = []
    for node in nodes_of(path):
        if isinstance(node, ast.ClassDef):
            marks = {ast.unparse(mark).rpartition(".")[2] for mark in node.decorator_list}
            bases = {re.sub(r"\[.*", "", ast.unparse(base)).rpartition(".")[2] for base in node.bases}
            if not ("final" in marks or bases & OPEN_BASES or node.name.endswith("Error")):
                found.append(f"{name_of(path)}: {node.name}")
    return found


def test_classes_are_abstract_or_final() -> None:
    assert [found for path in MODULES for found in open_classes(path)] == []


def test_modules_say_what_they_are() -> None:
    assert [name_of(path) for path in MODULES if not ast.get_docstring(tree_of(path))] == []


def begins_with_annotations(path: Path) -> bool:
    """Whether a module with anything in it first imports annotations from __future__."""
    body = tree_of(path).body
    first = next((node for node in body if isinstance(node, ast.ImportFrom)), None)
    return len(body) <= 1 or (first is not None and first.module == "__future__")


def test_modules_begin_with_annotations_from_the_future() -> None:
    assert [name_of(path) for path in MODULES if not begins_with_annotations(path)] == []


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
