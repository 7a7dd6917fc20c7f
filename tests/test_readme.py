"""The README's Python example prints what the README says, and the README stays short."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_is_short() -> None:
    by_hand = re.sub(r"<!-- (\w+) -->.*?<!-- end of \1 -->", "", README, flags=re.DOTALL)
    assert len(by_hand.splitlines()) <= 150


@pytest.mark.slow
def test_the_examples_run_and_print_what_is_written() -> None:
    example, *others = blocks("python")
    (written,) = blocks("text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    assert printed.getvalue() == written
    for other in others:
        exec(compile(other, "README.md", "exec"), {})


def test_every_command_is_named() -> None:
    from mixtura.cli import COMMANDS

    for command in COMMANDS:
        assert f"mixtura {command}" in README
