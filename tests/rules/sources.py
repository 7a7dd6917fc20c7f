"""The files that rules are about, each parsed once."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from mixtura.methods import PACKAGE_DIR

MODULES = sorted(PACKAGE_DIR.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    """What a file says, as Python reads it; for looking only."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Everything in a file, in no particular order."""
    return tuple(ast.walk(tree_of(path)))


def name_of(path: Path) -> str:
    """A file of the package as messages name it."""
    return str(path.relative_to(PACKAGE_DIR))
