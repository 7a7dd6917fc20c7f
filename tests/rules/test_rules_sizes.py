"""Files, functions and methods stay small enough to be read at once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mixtura.methods import PACKAGE_DIR, header, kinds, own_names

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 50  # its docstring aside
# Outside docstrings: what is said about a method may be long.
MOST_LINES_OF_A_METHOD = 105
MODULES = sorted(PACKAGE_DIR.rglob("*.py"))
METHODS = [header(kind.name, name).path for kind in kinds() for name in own_names(kind.name)]


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE_DIR))


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def spanned(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files(path: Path) -> None:
    assert num_lines(path) <= MOST_LINES_OF_A_FILE


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = spanned(node) - (spanned(node.body[0]) if ast.get_docstring(node) else 0)
            assert length <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_methods(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    documented = [one for one in nodes if isinstance(one, DOCUMENTED) and ast.get_docstring(one)]
    assert num_lines(path) - sum(spanned(one.body[0]) for one in documented) <= MOST_LINES_OF_A_METHOD
