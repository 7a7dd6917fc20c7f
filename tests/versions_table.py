"""Run tests and, if all pass, enter in docs/versions.json and docs/versions.md what they ran with.

python tests/versions_table.py newest -m "not slow"   # pytest's arguments after the environment's name
python tests/versions_table.py --write                # the page again, from what is recorded
"""

from __future__ import annotations

import json
import platform
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
from lowest_versions import ROOT, libraries, lowest, parsed, read_project

DATA = ROOT / "docs/versions.json"
PAGE = ROOT / "docs/versions.md"
ENVIRONMENTS = {
    "constraints": "`make test`: every test, with the versions of constraints.txt",
    "quick": "`make test-quick`: a few tests of each sort, with the versions of constraints.txt",
    "newest": "`make test-newest`: what is not slow, with the newest versions that pyproject.toml allows",
    "lowest": "`make test-lowest`: what is not slow, with the lowest versions that pyproject.toml allows",
}


class Counter:
    """A plugin of pytest that counts what passed."""

    def __init__(self) -> None:
        self.num_passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one test's own part: not what sets it up, nor a known gap."""
        self.num_passed += report.when == "call" and report.passed and not hasattr(report, "wasxfail")


def record(num_passed: int, today: str) -> dict[str, Any]:
    """What is installed here, for the libraries that mixtura uses, and what passed with it."""
    found = {}
    for name in sorted(lowest(read_project())):
        # Of what is optional, some need not be here.
        with suppress(PackageNotFoundError):
            found[name] = version(name).split("+")[0]
    return {"date": today, "python": platform.python_version(), "passed": num_passed, "versions": found}


def entered(records: dict[str, Any], environment: str, one: dict[str, Any]) -> dict[str, Any]:
    """The records with one environment's taken anew, in the page's order."""
    together = {**records, environment: one}
    return {name: together[name] for name in ENVIRONMENTS if name in together}


def markdown(records: dict[str, Any], ranges: dict[str, str]) -> str:
    """The page in docs."""
    lines = [
        "# Versions",
        "",
        "What the tests passed with, last. Written by `make test`, `make test-newest` and `make test-lowest` "
        "with `TESTED=1`.",
        "",
        *(f"- *{name}*: {ENVIRONMENTS[name]}" for name in records),
        "",
        f"| | allowed | {' | '.join(records)} |",
        f"|---|---|{'---|' * len(records)}",
        row("date", "", [one["date"] for one in records.values()]),
        row("tests passed", "", [one["passed"] for one in records.values()]),
        row("Python", "", [one["python"] for one in records.values()]),
    ]
    for name, allowed in ranges.items():
        lines.append(row(name, allowed, [one["versions"].get(name, "") for one in records.values()]))
    return "\n".join([*lines, ""])


def row(name: str, allowed: str, cells: list[Any]) -> str:
    """One line of the table."""
    return f"| {name} | {allowed} | {' | '.join(map(str, cells))} |"


def ranges(project: dict[str, Any]) -> dict[str, str]:
    """What pyproject.toml allows of each library, as it is written there."""
    return {parsed(one)[0]: one[one.index(">") :] for one in libraries(project)}


def page() -> str:
    """The page that what is recorded gives."""
    return markdown(json.loads(DATA.read_text(encoding="utf-8")), ranges(read_project()))


def main(arguments: list[str]) -> int:
    """Run and record, or write the page; the exit code is pytest's."""
    if arguments == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    environment, *rest = arguments
    if environment not in ENVIRONMENTS:
        raise SystemExit(f"{environment!r} is none of {', '.join(ENVIRONMENTS)}")
    counter = Counter()
    code = int(pytest.main(rest, plugins=[counter]))
    if code == 0:
        one = record(counter.num_passed, datetime.now(UTC).date().isoformat())
        records = entered(json.loads(DATA.read_text(encoding="utf-8")), environment, one)
        DATA.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
