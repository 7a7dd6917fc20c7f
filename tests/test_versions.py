"""What is installed by is what was tested: constraints.txt, the lower bounds, the page on versions."""

from __future__ import annotations

import json
import re

import pytest
from lowest_versions import ROOT, lowest, normal, parsed, read_project, tools
from versions_table import DATA, ENVIRONMENTS, PAGE, entered, markdown, page

CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
PINNED = dict(line.split("==") for line in CONSTRAINTS.splitlines() if not line.startswith("#"))


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def test_constraints_name_one_version_that_any_index_has() -> None:
    for name, version in PINNED.items():
        assert re.fullmatch(r"[\w.-]+", name)
        assert re.fullmatch(r"\d+(\.\d+)*(\.?(post|rc|a|b)\d+)?", version), f"{name} {version}"


def test_constraints_hold_every_requirement_above_its_lower_bound() -> None:
    pinned = {normal(name): version for name, version in PINNED.items()}
    project = read_project()
    for name, bound in lowest(project).items():
        assert release(pinned[name]) >= release(bound), name
    assert set(tools(project, CONSTRAINTS)) <= set(pinned)


def test_lower_bounds_are_those_written() -> None:
    project = {
        "name": "mine",
        "dependencies": ["torch>=2.9", "A_b.c[x]>=1.2.3,<2"],
        "optional-dependencies": {"more": ["torch>=2.9"], "test": ["mine[more]", "ruff>=1", "types-x"]},
    }
    assert lowest(project) == {"torch": "2.9", "a-b-c": "1.2.3"}
    assert tools(project, "# why\nruff==3.4\ntypes_x==5\nother==6\n") == {"ruff": "3.4", "types-x": "5"}


@pytest.mark.parametrize(("more", "why"), [("scipy", "needs a lower bound"), ("torch>=2.8", "two lower")])
def test_a_bound_that_is_missing_or_twofold_is_named(more: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        lowest({"dependencies": ["torch>=2.9"], "optional-dependencies": {"extra": [more]}})


def test_the_readme_and_make_install_by_the_constraints() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if line.startswith("pip install")]
    assert len(lines) >= 2
    assert all("-c constraints.txt" in line for line in lines)


def test_the_page_is_what_the_records_give() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python tests/versions_table.py --write"
    assert set(json.loads(DATA.read_text(encoding="utf-8"))) <= set(ENVIRONMENTS)


def test_a_record_takes_its_place_and_is_shown() -> None:
    old = {"date": "2026-01-01", "python": "3.11.0", "passed": 3, "versions": {"torch": "2.9.0"}}
    new = {"date": "2026-02-02", "python": "3.12.0", "passed": 4, "versions": {"torch": "2.13.0"}}
    records = entered({"lowest": old, "newest": old}, "newest", new)
    assert list(records) == ["newest", "lowest"]
    shown = markdown(records, {"torch": ">=2.9"})
    assert "| torch | >=2.9 | 2.13.0 | 2.9.0 |" in shown
    assert "| tests passed |  | 4 | 3 |" in shown
    assert parsed("torch>=2.9") == ("torch", "2.9")
