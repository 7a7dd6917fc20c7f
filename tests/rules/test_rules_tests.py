"""Tests do not fix what others decide: how many families and methods there are, and which releases."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from sources import tree_of

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("test_*.py"))
# What grows with other people's releases and with new files.
COUNTED = re.compile(r"(set\()?(\w*families|\w*methods|(own_)?names\(.*\)|kinds\(\))\)?", re.IGNORECASE)


def fixed_numbers(tree: ast.AST) -> Iterator[str]:
    """Comparisons of the number of families or methods, or of a version, with what is written there."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        written = [side for side in sides if isinstance(side, ast.Constant)]
        if any(isinstance(side.value, int) and side.value > 1 for side in written):
            counts = [s for s in sides if isinstance(s, ast.Call) and ast.unparse(s.func) == "len"]
            if any(COUNTED.fullmatch(ast.unparse(count.args[0])) for count in counts):
                yield ast.unparse(node)
        read = [ast.unparse(side) for side in sides if side not in written]
        if written and any("transformers.__version__" in side for side in read):
            yield ast.unparse(node)


def test_numbers_and_versions_are_not_fixed() -> None:
    assert [f"{path.name}: {found}" for path in FILES for found in fixed_numbers(tree_of(path))] == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("assert len(FAMILIES) == 64", 1),
        ("assert 55 <= len(own_names('routers'))", 1),
        ("assert transformers.__version__ == '5.20.0'", 1),
        ("assert len(set(FAMILIES)) == len(FAMILIES)", 0),
        ("assert len(rows) == 3", 0),
        ("assert len(METHODS) > 1", 0),
    ],
)
def test_the_rule_finds_what_it_names(line: str, found: int) -> None:
    assert len(list(fixed_numbers(ast.parse(line)))) == found
