"""Every method keeps the contract of its kind; a known gap must still be one."""

from __future__ import annotations

import pytest

from mixtura.authoring.contracts import Check, checks, is_slow, subject
from mixtura.methods import kinds, own_names

CASES = [
    pytest.param(
        kind.name,
        name,
        check,
        id=f"{kind.singular}-{name}-{check.__name__}",
        marks=[pytest.mark.xfail(reason=gap, strict=True)] * bool(gap) + [pytest.mark.slow] * is_slow(check),
    )
    for kind in kinds()
    for name in own_names(kind.name)
    for check in checks(kind.name)
    for gap in [subject(kind.name, name).header.gaps.get(check.__name__)]
]


@pytest.mark.parametrize(("kind", "name", "check"), CASES)
def test_contract(kind: str, name: str, check: Check) -> None:
    check(subject(kind, name))
