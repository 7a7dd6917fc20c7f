"""How a compression's or an upcycling's result is made beside its place, and takes it in one step."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixtura.errors import OutputError
from mixtura.fitting.journal import Journal

_PUBLISHED = "published"


def beside(out: Path) -> Path:
    """Where stopped work is kept, beside the result.

    Raises:
        OutputError: nothing can lie beside it.
    """
    named = out if out.name not in ("", "..") else out.resolve()
    if not named.name:
        raise OutputError(f"{out} cannot be written as a model; give a new directory")
    return named.with_name(named.name + ".work")


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Note how many seconds a step takes."""
    since = time.monotonic()
    yield
    seconds[step] = time.monotonic() - since


def replace_text(path: Path, text: str) -> None:
    """Give a file another text, in one step."""
    aside = path.with_name(f"{path.name}.aside")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def note_result(journal: Journal, asked: object, result: Mapping[str, Any]) -> None:
    """Keep what came of what was asked for, right before it takes its place."""
    journal.note(_PUBLISHED, {"choices": repr(asked), "result": dict(result)})


def put_in_place(model: Path, out: Path, name: str, result: Mapping[str, Any]) -> None:
    """Move a checkpoint to where it was asked for, with its result in a file of that name."""
    text = json.dumps(result, indent=1, sort_keys=True) + "\n"
    (model / name).write_text(text, encoding="utf-8")
    if out.is_dir():
        out.rmdir()
    os.replace(model, out)


def noted_result(out: Path, asked: object, *, is_there: bool) -> dict[str, Any] | None:
    """The result of work that was stopped once it was in its place; what is left of the work is removed."""
    journal = Journal(beside(out))
    noted = journal.notes().get(_PUBLISHED)
    if noted is None or not is_there or noted["choices"] != repr(asked):
        return None
    shutil.rmtree(journal.directory)
    result: dict[str, Any] = noted["result"]
    return result
