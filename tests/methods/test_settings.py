"""Settings of a method, checked by name and type."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from mixtura.errors import SettingError
from mixtura.methods.settings import construct, fits, settings


class Example:
    def __init__(self, size: int, *, share: float = 0.5, mode: Literal["a", "b"] = "a") -> None:
        self.size, self.share, self.mode = size, share, mode


def test_settings_are_the_keyword_only_arguments() -> None:
    assert list(settings(Example)) == ["share", "mode"]


def test_construct() -> None:
    made = construct(Example, 3, share=1, mode="b")
    assert (made.size, made.share, made.mode) == (3, 1, "b")
    with pytest.raises(SettingError, match="mode of Example must be"):
        construct(Example, 3, mode="c")
    with pytest.raises(SettingError, match="Example has no setting 'size'; there are: mode, share"):
        construct(Example, size=3)


@pytest.mark.parametrize(
    ("value", "wanted", "expected"),
    [
        (1, int, True),
        (1.0, int, False),
        (True, int, False),
        (1, float, True),
        ("1", float, False),
        (True, bool, True),
        (None, int | None, True),
        ("x", int | None, False),
        ([1, 2], list[int], True),
        ((1, 2), tuple[int, ...], True),
        ({"a": 1}, dict[str, int], True),
        ([1, "2"], list[int], False),
        ((1, None), tuple[int, ...], False),
        ((1, "a"), tuple[int, str], True),
        ((1,), tuple[int, str], False),
        ({"a": "b"}, dict[str, int], False),
        ({1: 1}, dict[str, int], False),
        ("anything", Any, True),
    ],
)
def test_fits(value: object, wanted: object, expected: bool) -> None:
    assert fits(value, wanted) is expected
