"""Constraints for pip: the lowest versions that pyproject.toml allows, and tools as in constraints.txt.

python tests/lowest_versions.py > constraints-lowest.txt

It runs in an environment in which nothing is installed yet.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?P<extras>\[[^]]*\])?\s*(?:>=\s*(?P<lowest>[\w.]+))?")


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parsed(requirement: str) -> tuple[str, str | None]:
    """Name and lower bound of a requirement.

    >>> parsed("transformers>=5.20,<6")
    ('transformers', '5.20')
    """
    found = _REQUIREMENT.match(requirement)
    assert found is not None, requirement
    return normal(found["name"]), found["lowest"]


def read_project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


def libraries(project: dict[str, Any]) -> list[str]:
    """The requirements of mixtura itself: all but those of the extra `test`, each once.

    An extra that takes another one's in is of no package of its own.
    """
    extras = project["optional-dependencies"]
    more = [one for name, ones in extras.items() if name != "test" for one in ones]
    every = dict.fromkeys([*project["dependencies"], *more])
    return [one for one in every if parsed(one)[0] != "mixtura"]


def lowest(project: dict[str, Any]) -> dict[str, str]:
    """The lower bound of everything that mixtura itself uses.

    Raises:
        ValueError: a requirement has no lower bound, or two different ones.
    """
    found: dict[str, str] = {}
    for name, bound in map(parsed, libraries(project)):
        if bound is None:
            raise ValueError(f"{name} needs a lower bound in pyproject.toml")
        if found.setdefault(name, bound) != bound:
            raise ValueError(f"{name} has two lower bounds in pyproject.toml, {found[name]} and {bound}")
    return found


def tools(project: dict[str, Any], constraints: str) -> dict[str, str]:
    """The version of each tool of the extra `test` that constraints.txt has."""
    pinned = dict(line.split("==") for line in constraints.splitlines() if not line.startswith("#"))
    by_name = {normal(name): version for name, version in pinned.items()}
    names = {name for name, _ in map(parsed, project["optional-dependencies"]["test"])}
    return {name: by_name[name] for name in sorted(names - {normal(project["name"])})}


def main() -> None:
    """Print one line a package."""
    project = read_project()
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name, version in {**tools(project, constraints), **lowest(project)}.items():
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
