"""Tables and cards from files: JSON lines, CSV or parquet, one outcome a row; cards as JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from mixtura.errors import UnknownNameError, UserError, counted_names, suggest
from mixtura.running.composing.tables import ReplayTable, make_table
from mixtura.types.models import PICO_PER_DOLLAR, ModelCard, Outcome, Prompt

# Columns of a table, with what they hold.
COLUMNS: Final[Mapping[str, str]] = {
    "prompt": "the text that was asked",
    "model": "the name of the model",
    "score": "how good the answer was, from 0 to 1 (true and false count as 1 and 0)",
    "id": "of the prompt; the text itself where it is left out",
    "cost": "dollars",
    "input_tokens": "",
    "output_tokens": "",
    "latency_ms": "",
    "answer": "what the model wrote",
    "propensity": "probability with which a policy chose the model",
}
# Any other column is a label of the prompt, such as "task".
_TEXT: Final = ("prompt", "model", "id", "answer")
_WHOLE: Final = ("input_tokens", "output_tokens")
_MILLION: Final = 1_000_000
_FIELDS: Final = ("context", "max_output", "num_bytes")
_WORDS: Final = ("description", "address", "model")
# What an object of a file of cards may have.
CARD_FIELDS: Final = ("name", "input_price", "output_price", "abilities", *_FIELDS, *_WORDS)


def read_table(path: str | Path, cards: str | Path | None = None) -> ReplayTable:
    """A table from a file, with the cards of another.

    Raises:
        UserError: a file is missing or not of its format, a column is missing or a value is none.
    """
    path = Path(path)
    known = () if cards is None else read_cards(Path(cards))
    prompts: dict[str, Prompt] = {}
    outcomes = []
    for number, row in enumerate(_rows(path), start=1):
        where = f"{path}, row {number}"
        prompt, outcome = _parsed(row, where)
        first = prompts.setdefault(prompt.id, prompt)
        if first.text != prompt.text or dict(first.labels) != dict(prompt.labels):
            raise UserError(f"{where} has the id {prompt.id!r} of a row with another text or other labels")
        outcomes.append(outcome)
    if not outcomes:
        raise UserError(f"{path} holds no rows; give one a prompt and model: prompt, model, score and cost")
    if all(one.score is None for one in outcomes):
        raise UserError(f"no row of {path} has a score; give a column 'score' from 0 to 1")
    if known:
        names = {card.name for card in known}
        for one in outcomes:
            if one.model not in names:
                raise UnknownNameError(f"card (in {cards}) of a model", one.model, names)
    return make_table(prompts.values(), known, outcomes)


def read_cards(path: Path) -> tuple[ModelCard, ...]:
    """Cards from a JSON file: a list of objects, prices in dollars a million tokens.

    Raises:
        UserError: the file is missing or no such list, or a field is unknown or has a wrong value.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the cards {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); give a list of cards") from None
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed) or not listed:
        raise UserError(f'{path} is no list of cards; give [{{"name": ..., "input_price": ...}}, ...]')
    return tuple(card_from(one, f"{path}, card {n}") for n, one in enumerate(listed, start=1))


def card_from(values: Mapping[str, Any], where: str) -> ModelCard:
    """A card from an object of its file; `card_values` writes one.

    Raises:
        UserError: a field is unknown, missing or has a wrong value.
    """
    for key in values:
        if key not in CARD_FIELDS:
            raise UserError(f"{where} has the field {key!r}; {suggest(str(key), CARD_FIELDS)}")
    name = values.get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where} has no name; give each card the name of its model")
    given: dict[str, Any] = {}
    for key in ("input_price", "output_price"):
        if values.get(key) is not None:
            price = _number(values[key], f"{key} of {name} in {where}")
            given[key] = round(price * PICO_PER_DOLLAR / _MILLION)
    for key in _FIELDS:
        if values.get(key) is not None:
            given[key] = round(_number(values[key], f"{key} of {name} in {where}"))
    given |= {key: str(values[key]) for key in _WORDS if values.get(key) is not None}
    abilities = values.get("abilities", [])
    if not isinstance(abilities, list) or not all(isinstance(one, str) for one in abilities):
        raise UserError(f"abilities of {name} in {where} are words in a list, got {abilities!r}")
    return ModelCard(name=name, abilities=frozenset(abilities), **given)


def card_values(card: ModelCard) -> dict[str, Any]:
    """A card as an object of its file."""
    prices = {
        key: getattr(card, key) * _MILLION / PICO_PER_DOLLAR
        for key in ("input_price", "output_price")
        if getattr(card, key) is not None
    }
    rest = {key: getattr(card, key) for key in (*_FIELDS, *_WORDS) if getattr(card, key) not in (None, "")}
    return {"name": card.name, **prices, **rest, "abilities": sorted(card.abilities)}


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise UserError(f"{where} must be a number, 0 or more, got {value!r}")
    return float(value)


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise UserError(f"there is no table {path}; give a .jsonl, .csv or .parquet file of outcomes")
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        yield from _json_lines(path)
    elif kind == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    elif kind == ".parquet":
        yield from _parquet(path)
    else:
        raise UserError(f"{path} is no table by its name; give a .jsonl, .csv or .parquet file")


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number} is no object; give one outcome a line")
            yield row


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"reading {path} takes pyarrow; pip install 'mixtura[parquet]' or give JSONL"
        ) from None
    for batch in parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _parsed(row: Mapping[str, Any], where: str) -> tuple[Prompt, Outcome]:
    present = {key: value for key, value in row.items() if value not in (None, "")}
    needed = ["model"] if "id" in present else ["prompt", "model"]
    missing = [key for key in needed if key not in present]
    if missing:
        have = counted_names([str(key) for key in present], 8)
        raise UserError(f"{where} lacks {' and '.join(missing)}; it has {have or 'nothing'}")
    text = str(present.get("prompt", ""))
    values: dict[str, Any] = {}
    for key in COLUMNS:
        if key in present and key not in _TEXT:
            values[key] = _value(present[key], key, where)
    if "cost" in values:
        values["cost"] *= PICO_PER_DOLLAR
    labels = {str(k): str(v) for k, v in present.items() if k not in COLUMNS and k is not None}
    id_ = str(present.get("id", text))
    answer = str(present["answer"]) if "answer" in present else None
    prompt = Prompt(id=id_, text=text, labels=labels, num_tokens=values.get("input_tokens"))
    return prompt, Outcome(prompt=id_, model=str(present["model"]), answer=answer, **values)


def _value(value: Any, key: str, where: str) -> float | int:
    words = {"true": 1.0, "false": 0.0}
    try:
        number = words.get(value.lower()) if isinstance(value, str) else float(value)
        number = float(value) if number is None else number
    except (TypeError, ValueError):
        raise UserError(f"{where}: {key} is {value!r}; give a number") from None
    if not number >= 0 or number == float("inf"):
        raise UserError(f"{where}: {key} is {value!r}; give a number, 0 or more")
    return round(number) if key in _WHOLE else number
