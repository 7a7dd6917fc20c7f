"""Which tests are run, and in what order: hooks of pytest for conftest.py."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `make test-quick` asks for."""
    parser.addoption("--few", type=int, help="of each test with parameters run this many, evenly spread")


# Last, so that of what is left out by marks nothing is counted.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not asked for; begin with slow files, so that the last one is not a long one."""
    if most := config.getoption("few"):
        chosen = few_of(items, most)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
    every = Counter(item.path for item in items)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path] / every[item.path])


def few_of(items: list[pytest.Item], most: int) -> set[pytest.Item]:
    """Of each test at most this many of its parameters, the first among them and the others evenly spread.

    A test of every method counts as one for each kind, by its parameter ``kind``. What these choose never
    depends on what else is run.
    """
    alike: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        of_kind = str(item.callspec.params.get("kind", "")) if hasattr(item, "callspec") else ""
        alike.setdefault((item.nodeid.partition("[")[0], of_kind), []).append(item)
    return {item for group in alike.values() for item in _spread(group, most)}


def _spread(group: list[pytest.Item], most: int) -> list[pytest.Item]:
    if len(group) <= most:
        return group
    return [group[place * len(group) // most] for place in range(most)]
