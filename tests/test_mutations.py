"""The faults of tests/mutations.py can still be put into the code as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations import FAULTS, ROOT, Fault, find


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_fault_has_one_place_and_its_tests_are_there(fault: Fault) -> None:
    find(ROOT / "src", fault.old)
    assert fault.old != fault.new
    assert len(list((ROOT / "tests").rglob(fault.tests))) == 1


def test_a_text_that_is_gone_or_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    assert find(tmp_path, "x = 1").name == "a.py"
    with pytest.raises(LookupError, match="0 files"):
        find(tmp_path, "y = 1")
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    with pytest.raises(LookupError, match="one place"):
        find(tmp_path, "x = 1")
