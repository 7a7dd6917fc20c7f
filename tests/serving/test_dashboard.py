"""The page at ``/`` has all that it needs in itself."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("fastapi")

from mixtura.serving.dashboard import page


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = page()
    assert not re.search(r"(?:https?:)?//[\w.-]+\.\w", text)
    assert not re.search(r"<(?:link|script|img)[^>]*(?:src|href)=", text)
    assert "@import" not in text
    assert "/* style of reports */" not in text
    assert "prefers-color-scheme: dark" in text


def test_every_part_that_the_script_fills_is_there() -> None:
    text = page()
    wanted = set(re.findall(r'\$\("(\w+)"\)', text))
    assert wanted
    assert wanted <= set(re.findall(r'id="(\w+)"', text))
