"""Every method keeps the contract of its kind; a known gap must still be one."""

from __future__ import annotations

import pytest

from mixtura.authoring.contracts import checks, is_slow, run
from mixtura.methods import kinds, own_names

METHODS = [(kind.name, name) for kind in kinds() for name in own_names(kind.name)]
SLOW = {kind.name: [check.__name__ for check in checks(kind.name) if is_slow(check)] for kind in kinds()}


def unkept(kind: str, name: str, only: list[str]) -> list[str]:
    """The checks of those asked for that do not come out as the method's file says, each with why."""
    outcomes = run(kind, name, only)
    assert {outcome.check for outcome in outcomes} == set(only)
    return [f"{one.check}: {one.status}: {one.reason}" for one in outcomes if not one.ok]


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_contract(kind: str, name: str) -> None:
    quick = [check.__name__ for check in checks(kind) if check.__name__ not in SLOW[kind]]
    assert quick
    assert unkept(kind, name, quick) == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [one for one in METHODS if SLOW[one[0]]])
def test_slow_part_of_the_contract(kind: str, name: str) -> None:
    assert unkept(kind, name, SLOW[kind]) == []
