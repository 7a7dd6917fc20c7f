"""Prompts for each of several models, from a JSON file.

The file holds an object. A key is a model as it was given on the command line, the name of its directory,
or its number, counted from 0. Its value is a list of prompts; or the path of a text file or a directory of
them, seen from the file; or an object with ``for`` and ``not_for``, each a list or a path::

    {"./math-1b": ["3 + 4 =", "Solve for x:"], "./code-1b": {"for": "code/", "not_for": ["Once upon"]}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtura.data import text as data_text
from mixtura.data.records import Document
from mixtura.data.tokens import encode_documents, num_embeddings_of
from mixtura.errors import UserError, suggest
from mixtura.running.dense_tracing import Group

_EXAMPLE = '{"MODEL": ["a prompt", "another"], "OTHER": ["..."]}'
_FIELDS = ("for", "not_for")


def read_prompts(
    file: Path, sources: Sequence[Path], names: Sequence[str], tokenizer: Any, config: Any, length: int
) -> tuple[Group, ...]:
    """The prompts of each source, as groups of tokens.

    Raises:
        UserError: the file is missing or no such object, names no source, or a source has no prompts.
    """
    said = _object(file)
    keys = [_keys(number, source, names[number]) for number, source in enumerate(sources)]
    every = [key for own in keys for key in own]
    for key in said:
        if every.count(key) != 1:
            problem = "several models" if key in every else "no model"
            raise UserError(f"{file} has prompts for {key!r}, which is {problem}; {suggest(key, every)}")
    groups: list[Group] = []
    for number, own in enumerate(keys):
        given = [said[key] for key in own if key in said]
        if len(given) != 1:
            how = "twice" if given else "nowhere"
            raise UserError(
                f"{file} has prompts for {names[number]} {how}; give each model's once, under its "
                f"directory's name or its number {number}"
            )
        for field, documents in _documents(given[0], file, names[number], tokenizer).items():
            tokens = encode_documents(
                documents, tokenizer, max_length=length, num_embeddings=num_embeddings_of(config)
            )
            groups.append(Group(tokens, number, field == "not_for"))
    return tuple(groups)


def _keys(number: int, source: Path, name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((str(number), str(source), name, source.resolve().name)))


def _object(file: Path) -> Mapping[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the prompts {file}: {error.strerror}; give a JSON file such as {_EXAMPLE}"
        ) from None
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}; write it as {_EXAMPLE}") from None
    if not isinstance(said, dict) or not said:
        raise UserError(f"{file} must hold an object of prompts by model, such as {_EXAMPLE}")
    return said


def _documents(value: Any, file: Path, name: str, tokenizer: Any) -> dict[str, tuple[Document, ...]]:
    """Documents under ``for`` and, where there are some, ``not_for``."""
    fields = value if isinstance(value, dict) else {"for": value}
    unknown = [key for key in fields if key not in _FIELDS]
    if unknown or "for" not in fields:
        raise UserError(
            f"the prompts for {name} in {file} have the fields {', '.join(map(repr, fields)) or 'none'}; "
            f"expected 'for' and perhaps 'not_for'"
        )
    return {key: _read(one, file, name, tokenizer) for key, one in fields.items()}


def _read(value: Any, file: Path, name: str, tokenizer: Any) -> tuple[Document, ...]:
    if isinstance(value, str):
        return data_text.read(file.parent / value, tokenizer)
    listed = value if isinstance(value, list) else []
    prompts = [one for one in listed if isinstance(one, str) and one.strip()]
    if not prompts or len(prompts) != len(listed):
        raise UserError(
            f"the prompts for {name} in {file} must be a list of texts that are not empty, or the path of "
            f"text, got {str(value)[:80]!r}"
        )
    return tuple(Document(domain=name, name=f"prompt {n}", text=text) for n, text in enumerate(prompts))
