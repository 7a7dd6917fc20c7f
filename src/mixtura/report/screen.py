"""What commands print for people: names as they are, whole tables in files and pipes, colours if wanted."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

# Of lines that go to a file or a pipe: nothing is cut or wrapped there.
_ENDLESS = 100_000


def screen(*, stderr: bool = False) -> Console:
    """A console of rich that shows text as it is, without markup or emoji codes, in lines of any length.

    On a terminal lines are as long as that is wide, and styled unless NO_COLOR is set.
    """
    stream = sys.stderr if stderr else sys.stdout
    is_terminal = stream is not None and stream.isatty()
    return Console(
        stderr=stderr,
        width=None if is_terminal else _ENDLESS,
        markup=False,
        emoji=False,
        highlight=False,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
    )


def show_table(
    console: Console,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    left: Collection[int] = (0,),
    indent: int = 0,
) -> None:
    """Print a table; where a terminal is too narrow cells go on below, at words where that can be.

    Args:
        console: from `screen`.
        headers: of the columns; none at all for a table without.
        rows: the cells.
        title: a line above.
        left: numbers of the columns that are read from the left; the others hold numbers.
        indent: spaces before every line.
    """
    if title:
        console.print(Text(title, style="bold"))
    width = max((len(row) for row in rows), default=len(headers))
    table = Table(box=None, pad_edge=False, show_header=bool(headers))
    for number in range(width):
        name = headers[number] if headers else ""
        table.add_column(Text(name), justify="left" if number in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(Padding(table, (0, 0, 0, indent), expand=False))
