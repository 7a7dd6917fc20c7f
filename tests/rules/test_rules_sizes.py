"""Files, functions and methods stay small enough to be read at once."""

from __future__ import annotations

import ast
from pathlib import Path

from sources import MODULES, name_of, nodes_of

from mixtura.methods import header, kinds, own_names

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 50  # its docstring aside
# Outside docstrings: what is said about a method may be long.
MOST_LINES_OF_A_METHOD = 105
METHODS = [header(kind.name, name).path for kind in kinds() for name in own_names(kind.name)]


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def spanned(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def long_functions(path: Path) -> list[str]:
    """The functions of a file that are too long, each with its length."""
    found = []
    for node in nodes_of(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = spanned(node) - (spanned(node.body[0]) if ast.get_docstring(node) else 0)
            if length > MOST_LINES_OF_A_FUNCTION:
                found.append(f"{name_of(path)}: {node.name} has {length} lines")
    return found


def num_lines_of_a_method(path: Path) -> int:
    """The lines of a method's file outside docstrings."""
    documented = [one for one in nodes_of(path) if isinstance(one, DOCUMENTED) and ast.get_docstring(one)]
    return num_lines(path) - sum(spanned(one.body[0]) for one in documented)


def test_files() -> None:
    assert [name_of(path) for path in MODULES if num_lines(path) > MOST_LINES_OF_A_FILE] == []


def test_functions() -> None:
    assert [found for path in MODULES for found in long_functions(path)] == []


def test_methods() -> None:
    assert METHODS
    assert [name_of(path) for path in METHODS if num_lines_of_a_method(path) > MOST_LINES_OF_A_METHOD] == []
