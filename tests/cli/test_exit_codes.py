"""Exit codes tell a wish that cannot be met from one that was mistyped."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mixtura.errors import BudgetError, SettingError, UnknownNameError, UnmetError, UserError

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("a"), 2),
        (SettingError("a"), 2),
        (UnknownNameError("router", "a", ["b"]), 2),
        (UnmetError("a"), 3),
        (BudgetError("a"), 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_carries_its_code(error: UserError, code: int) -> None:
    assert error.exit_code == code


def test_a_budget_below_the_runtime_is_unmet_and_a_word_is_mistyped(run: Run) -> None:
    code, out, err = run("fit", "--estimate", "--memory", "1MiB")
    assert (code, out) == (3, "")
    assert err.startswith("error: ")
    code, out, err = run("fit", "--estimate", "--memory", "lots")
    assert (code, out) == (2, "")
    assert err.startswith("error: 'lots' is not a size")
