"""Read a user's text: files and directories of UTF-8 text, or records as training tools write them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, final

from mixtura.data.records import Document, TextError, readable
from mixtura.data.shapes import document_of, has_shape
from mixtura.errors import MixturaWarning, counted_names

SHORTEST_TEXT = 200
_LINES = (".jsonl", ".ndjson", ".jsonlines")


@final
class Entry(NamedTuple):
    """One record, or the whole text of a file, with its domain, its name, and where it stands."""

    value: Any
    domain: str
    name: str
    where: str


@final
class _NotTextError(Exception):
    """A file that is no text; says why."""


def read(path: str | Path, tokenizer: Any | None = None) -> tuple[Document, ...]:
    """Read a file, or all files of a directory that are not hidden.

    A `.jsonl` file holds an object on each line, a `.json` file may hold a list of them: with "text", with
    "prompt" and "answer" or "completion", with "instruction", "input" and "output", or with "messages" or
    "conversations", which the tokenizer's chat template words. A "domain" beside them is kept. Any other
    file is one document of UTF-8 text. The domain of a document is else the sub-directory it lies in, or
    its file's name without the ending. Files of a directory that are no text are left out with a warning.

    Raises:
        TextError: where the path is missing, a file is not UTF-8 or has a malformed line, or there
            is too little text.
    """
    root = Path(path)
    files = _files(root)
    documents: list[Document] = []
    left_out: dict[str, str] = {}
    for file in files:
        try:
            text = _text_of(file)
        except _NotTextError as reason:
            if file == root:
                raise TextError(f"{file} {reason}; give a file of UTF-8 text") from None
            left_out[file.relative_to(root).as_posix()] = f"{file} {reason}"
            continue
        documents += _read_file(file, root, text, tokenizer)
    if len(left_out) == len(files):
        first = next(iter(left_out.values()))
        raise TextError(f"{root} holds no file of UTF-8 text: {first}; convert it or give other text")
    if left_out:
        warnings.warn(f"left out of {root}, as no UTF-8 text: {counted_names(left_out)}", MixturaWarning, 2)
    size = sum(len(document.text) for document in documents)
    if not documents or size == 0:
        raise TextError(f"{root} is empty; at least {SHORTEST_TEXT} characters of text are needed")
    if size < SHORTEST_TEXT:
        raise TextError(f"{root} holds {size} characters of text; at least {SHORTEST_TEXT} are needed")
    return tuple(documents)


def _files(root: Path) -> list[Path]:
    """The file itself, or the files of a directory that are not hidden."""
    try:
        found = _below(root) if root.is_dir() else [root] if root.exists() else None
    except OSError as error:
        # A name that is too long, say: a text where its path belongs.
        raise TextError(f"no text can be read at {str(root)[:80]!r}: {error.strerror}; give a path") from None
    if found is None:
        raise TextError(f"no text at {root}; give a file or directory of UTF-8 text or JSONL")
    if not found:
        raise TextError(f"the directory {root} holds no files; put UTF-8 text or .jsonl files there")
    return found


def _below(root: Path) -> list[Path]:
    return [
        file
        for file in sorted(root.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]


def _text_of(file: Path) -> str:
    if file.is_char_device() or file.is_block_device():
        raise _NotTextError("is a device")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _NotTextError(f"is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise _NotTextError(f"cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise _NotTextError(f"is binary (byte {text.encode().index(0)} is zero)")
    return text


def _read_file(file: Path, root: Path, text: str, tokenizer: Any | None) -> Iterator[Document]:
    for entry in _entries(file, root, text):
        if isinstance(entry.value, str):
            yield Document(entry.value, entry.domain, entry.name)
        else:
            yield document_of(entry.value, entry.domain, entry.name, entry.where, tokenizer)


def entries(path: str | Path) -> Iterator[Entry]:
    """What a file, or each file of a directory that is not hidden, holds, before it is worded as text.

    Raises:
        TextError: the path is missing, or a file is no text or has a malformed line.
    """
    root = Path(path)
    for file in _files(root):
        try:
            text = _text_of(file)
        except _NotTextError as reason:
            raise TextError(f"{file} {reason}; give files of UTF-8 text") from None
        yield from _entries(file, root, text)


def _entries(file: Path, root: Path, text: str) -> Iterator[Entry]:
    relative = file.relative_to(root) if file != root else Path(file.name)
    domain = readable(relative.parts[0] if len(relative.parts) > 1 else relative.stem)
    name = readable(relative.as_posix())
    kind = file.suffix.lower()
    listed = _listed(text) if kind == ".json" else None
    numbered: Iterator[tuple[int, Any]]
    if kind in _LINES:
        numbered = ((number, _parsed(line, f"{file}, line {number}")) for number, line in _numbered(text))
        word = "line"
    elif listed is not None:
        numbered, word = iter(enumerate(listed, start=1)), "entry"
    else:
        if text.strip():
            yield Entry(text, domain, name, str(file))
        return
    for number, value in numbered:
        yield Entry(_record(value), domain, f"{name}:{number}", f"{file}, {word} {number}")


def _record(value: Any) -> Any:
    """A value that is no record, wrapped so that it is not taken for a file of text."""
    return [value] if isinstance(value, str) else value


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise TextError(f"{where} is not JSON ({reason}); give one object a line") from None


def _listed(text: str) -> list[Any] | None:
    """The list of records that a `.json` file holds; None where it holds something else, which is text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_records = isinstance(found, list) and bool(found) and has_shape(found[0])
    return found if is_records else None
