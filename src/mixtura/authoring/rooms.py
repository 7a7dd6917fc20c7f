"""The rooms of the package in the order in which they may import each other, and the README's tree of them.

A room imports from rooms of earlier rows only; within a room no circle of files imports itself. This is the
one place that says so: `tests/rules` holds the code to it, and `python -m mixtura.authoring.docs` writes the
README's tree and the architecture's line from it and from the first line of each room's docstring.
"""

from __future__ import annotations

import ast

from mixtura.methods import PACKAGE_DIR, kinds

ROOMS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("types", "machine", "report"),
    ("methods",),
    ("kernels",),
    ("data",),
    ("modeling",),
    ("checkpoints",),
    ("rerouting",),
    ("adapting",),
    ("running",),
    ("serving", "train"),
    ("fitting",),
    ("authoring",),
    ("cli",),
)
# Where a newcomer looks first, and what each group means to somebody who wants to change something.
_GROUPS = (
    ("the catalogue: add a file here", ("methods", "authoring")),
    (
        "the core: what every method stands on",
        ("types", "kernels", "modeling", "checkpoints", "rerouting", "adapting"),
    ),
    ("what users run", ("running", "serving", "fitting", "train", "cli")),
    ("what the rest needs", ("data", "report", "machine", "errors")),
)
_WIDTH = 16


def levels() -> dict[str, int]:
    """Each room's row: a room may import from rooms of lower rows.

    >>> levels()["errors"] < levels()["methods"] < levels()["cli"]
    True
    """
    return {room: level for level, row in enumerate(ROOMS) for room in row}


def first_line(room: str) -> str:
    """The first line of a room's docstring, without the full stop."""
    folder = PACKAGE_DIR / room
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0].rstrip(".")


def tree() -> str:
    """The rooms by what they are for, one line each, as the README shows them."""
    lines = ["src/mixtura/"]
    for title, rooms in _GROUPS:
        lines.append(f"  # {title}")
        for room in rooms:
            name = f"{room}/" if (PACKAGE_DIR / room).is_dir() else f"{room}.py"
            lines.append(f"  {name:<{_WIDTH}}{first_line(room)}")
            if room == "methods":
                lines.append(f"    {' '.join(f'{kind.name}/' for kind in kinds())}")
    return "\n".join(lines)


def order() -> str:
    """The rooms from the first, which imports nothing, to the last, which nothing imports."""
    return " ← ".join(", ".join(row) for row in ROOMS)
