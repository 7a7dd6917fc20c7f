"""Texts and pairs of answers as an ensemble learns from them and is scored on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor

from mixtura.data.records import Document, TextError
from mixtura.data.tokens import encode_text, num_embeddings_of, pad_id
from mixtura.errors import UserError, suggest
from mixtura.methods.ensembles import NO_TARGET, Lesson
from mixtura.running.ensembling.team import Team


@final
@dataclass(frozen=True, slots=True)
class Row:
    """A text: its tokens, how many of them are the prompt, and its domain."""

    token_ids: tuple[int, ...]
    num_prompt: int
    domain: str = ""


@final
@dataclass(frozen=True, slots=True)
class Pair:
    """An answer that is preferred to another, to the same prompt."""

    preferred: Row
    other: Row


def rows_of(
    documents: Sequence[Document], team: Team, *, length: int = 256, num_prompt: int = 16
) -> list[Row]:
    """Documents in pieces of some tokens; the prompt is a record's own, else the first tokens of a piece.

    Raises:
        UserError: no document is longer than a prompt.
    """
    embeddings = num_embeddings_of(team.models[0].config)
    made = []
    for one in documents:
        if one.prompt and one.answer:
            whole = one.text.removeprefix(one.prompt) if one.text.startswith(one.prompt) else one.answer
            made.append(row_of(team, one.prompt, whole, one.domain, length))
            continue
        ids = encode_text(one.text, team.tokenizer, embeddings)
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            if len(piece) > num_prompt:
                made.append(Row(tuple(piece), num_prompt, one.domain))
    if not made:
        raise UserError(f"no text is longer than a prompt of {num_prompt} tokens; give longer text")
    return made


def row_of(team: Team, prompt: str, answer: str, domain: str = "", length: int = 1 << 20) -> Row:
    """A prompt and its answer, from which tokens are left out after so many."""
    embeddings = num_embeddings_of(team.models[0].config)
    asked = encode_text(prompt, team.tokenizer, embeddings)
    said = encode_text(answer, team.tokenizer, embeddings, begin=False)
    ends = getattr(team.tokenizer, "eos_token_id", None)
    whole = [*asked, *said, *([] if ends is None else [ends])][:length]
    return Row(tuple(whole), min(len(asked), len(whole) - 1), domain)


def read_pairs(path: Path, team: Team) -> list[Pair]:
    """Pairs of a file of JSON lines with "prompt", "chosen" and "rejected".

    Raises:
        TextError: there is no such file, or a line lacks one of these.
    """
    names = ("prompt", "chosen", "rejected")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read ({error}); give a .jsonl file of pairs") from None
    made = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not all(isinstance(found.get(one), str) for one in names):
            have = found if isinstance(found, dict) else {}
            lacking = next((one for one in names if not isinstance(have.get(one), str)), "prompt")
            raise TextError(
                f"line {number} of {path} has no text named {lacking!r}; each line is an object with "
                f"prompt, chosen and rejected; {suggest(lacking, have)}"
            )
        sides = [row_of(team, found["prompt"], found[one]) for one in names[1:]]
        made.append(Pair(*sides))
    if not made:
        raise TextError(f"{path} holds no pairs; each line is an object with prompt, chosen and rejected")
    return made


def lesson_of(rows: Sequence[Row], team: Team) -> Lesson:
    """Rows side by side, padded on the right; what comes after the prompt is learnt."""
    width = max(len(row.token_ids) for row in rows) - 1
    pad = pad_id(team.tokenizer, num_embeddings_of(team.models[0].config), ("pad_token_id", "eos_token_id"))
    ids = torch.full((len(rows), width), pad)
    valid, targets = torch.zeros_like(ids), torch.full_like(ids, NO_TARGET)
    for place, row in enumerate(rows):
        whole, begin = torch.tensor(row.token_ids), max(row.num_prompt, 1)
        ids[place, : len(whole) - 1] = whole[:-1]
        valid[place, : len(whole) - 1] = 1
        targets[place, begin - 1 : len(whole) - 1] = whole[begin:]
    return Lesson(team.read(ids, valid, prompts_of(rows)), targets)


def prompts_of(rows: Sequence[Row]) -> Int[Tensor, " S"]:
    """How many tokens of each row are its prompt."""
    return torch.tensor([row.num_prompt for row in rows])


def in_turn(rows: Sequence[Any], size: int, seed: int) -> Any:
    """Batches without end: all rows in an order drawn anew each time."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[Any] = []
    while True:
        while len(waiting) < size:
            waiting += [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
        yield waiting[:size]
        waiting = waiting[size:]
