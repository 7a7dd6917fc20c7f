"""The text a fit reads: some to observe and price experts on, other text to judge the result by."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from mixtura.data import text as data_text
from mixtura.data.records import Document
from mixtura.data.tokens import TokenBatch, encode_text
from mixtura.errors import UnknownNameError, UserError
from mixtura.fitting.quality import HeldOut
from mixtura.fitting.records import Request

Encode = Callable[..., list[int]]

_SHORTEST = 8
_SEQUENCE_LENGTH = 512
_MOST_ANSWERS = 60
_CHARS_PER_TOKEN = 8
# Of the loss that decides, and of the calibration text as far as it goes, what a user's task has.
TASK_SHARE = 0.5


@final
@dataclass(frozen=True, slots=True)
class Texts:
    """Calibration and held-out text of one fit; no document is in both.

    Attributes:
        calibration: what the model is observed on.
        held_out: what candidates are judged by.
        digest: names the documents and how they were cut, so that a journal can tell them apart.
        shares: by domain, its share of the loss that decides; domains that are not named have the rest by
            their tokens.
        notes: what the reader of a result should know of the text, a sentence each.
    """

    calibration: tuple[HeldOut, ...]
    held_out: tuple[HeldOut, ...]
    digest: str
    shares: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load_texts(
    path: Path | None,
    tokenizer: Any,
    *,
    length: int,
    calibration_tokens: int,
    held_out_tokens: int,
    seed: int,
    num_embeddings: int | None = None,
    task: Path | None = None,
    keep_domain: str | None = None,
) -> Texts:
    """Read the user's text, or the text that comes with mixtura, and cut it into sequences.

    A user's text is split by sequence: two of three calibrate, the third judges. With ``num_embeddings``,
    those of the model, no token is let through that has none.

    Args:
        path: a user's text.
        tokenizer: of the model.
        length: tokens of a sequence at most.
        calibration_tokens: of each kind of text, about.
        held_out_tokens: of each kind of text, about.
        seed: of the choice of text.
        num_embeddings: of the model.
        task: a user's prompts, split in the same way: a domain of its own, with half of the loss that
            decides and, as far as it goes, of the calibration text.
        keep_domain: a domain that is given half of the calibration text as far as it goes.

    Raises:
        UserError: the text is missing, unreadable, too short or has tokens that the model has not, or no text
            is of the domain.
    """
    encode = partial(encode_text, tokenizer=tokenizer, num_embeddings=num_embeddings)
    favoured = [keep_domain] if keep_domain is not None else []
    if path is None:
        chars = _CHARS_PER_TOKEN * max(calibration_tokens, held_out_tokens)
        calibration = _cut(data_text.calibration(chars, seed=seed), encode, length)
        held_out = _cut(data_text.held_out(chars, seed=seed), encode, length)
    else:
        calibration, held_out = _split(_cut(data_text.read(path, tokenizer), encode, length), path, length)
    _check_long(calibration, held_out, path, length)
    shares: dict[str, float] = {}
    if task is not None:
        name = f"task:{task.stem}"
        own = [replace(document, domain=name) for document in data_text.read(task, tokenizer)]
        to_see, to_judge = _split(_cut(own, encode, length), task, length)
        calibration, held_out = [*to_see, *calibration], [*to_judge, *held_out]
        favoured.append(name)
        shares[name] = TASK_SHARE
    if keep_domain is not None:
        _check_domain(keep_domain, calibration, held_out)
    digest = hashlib.sha256()
    for sequence in (*calibration, *held_out):
        digest.update(np.asarray(sequence.ids, dtype=np.int64).tobytes())
    return Texts(
        calibration=(seen := _parts(calibration, calibration_tokens, favoured)),
        held_out=_parts(held_out, held_out_tokens, favoured),
        digest=f"sha256:{digest.hexdigest()}",
        shares=shares,
        notes=tuple(_told(name, seen, shares) for name in favoured),
    )


def _split(every: Sequence[_Sequence], path: Path, length: int) -> tuple[list[_Sequence], list[_Sequence]]:
    """Two of three to calibrate on, the third to judge by."""
    calibration = [s for number, s in enumerate(every) if number % 3 != 2]
    held_out = [s for number, s in enumerate(every) if number % 3 == 2]
    _check_long(calibration, held_out, path, length)
    return calibration, held_out


def _check_long(
    calibration: Sequence[_Sequence], held_out: Sequence[_Sequence], path: Path | None, length: int
) -> None:
    if not calibration or not held_out:
        where = "the text" if path is None else str(path)
        raise UserError(
            f"{where} is too short: it makes {len(calibration) + len(held_out)} sequences of at most "
            f"{length} tokens, and at least 3 are needed, two to calibrate on and one to judge by; give "
            f"more text"
        )


def _check_domain(name: str, calibration: Sequence[_Sequence], held_out: Sequence[_Sequence]) -> None:
    here = {s.domain for s in calibration} & {s.domain for s in held_out}
    if name not in here:
        raise UnknownNameError("domain of the text", name, sorted(here))


def _told(name: str, seen: Sequence[HeldOut], shares: Mapping[str, float]) -> str:
    """How much of the text, and of the loss that decides, a domain has."""
    tokens: Counter[str] = Counter()
    for part in seen:
        for domain, mask in zip(part.domains, part.attention_mask, strict=True):
            tokens[part.domain_names[domain]] += int(mask.sum())
    said = f"{name} is {tokens[name] / tokens.total():.0%} of the calibration text"
    return f"{said} and {shares[name]:.0%} of the loss that decides" if name in shares else said


def sequence_length(context: int) -> int:
    """Tokens that text is cut to where the cache is to hold ``context``; more only takes memory."""
    return min(_SEQUENCE_LENGTH, context)


def texts_of(request: Request, context: int, tokenizer: Any, num_embeddings: int | None = None) -> Texts:
    """The text a request is to be measured on, in full; with ``num_embeddings``, those of the model, checked.

    Raises:
        UserError: the text is missing, unreadable, too short, or has a token the model has no embedding of.
    """
    return load_texts(
        request.text,
        tokenizer,
        length=sequence_length(context),
        calibration_tokens=request.calibration_tokens,
        held_out_tokens=request.held_out_tokens,
        seed=request.seed,
        num_embeddings=num_embeddings,
        task=request.task,
        keep_domain=request.keep_domain,
    )


def as_batch(parts: tuple[HeldOut, ...]) -> TokenBatch:
    """All sequences in one batch, so that the model is read from disk as seldom as can be."""
    width = max(part.input_ids.shape[1] for part in parts)
    names = tuple(dict.fromkeys(name for part in parts for name in part.domain_names))

    def widened(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))

    return TokenBatch(
        input_ids=torch.cat([widened(part.input_ids) for part in parts]),
        attention_mask=torch.cat([widened(part.attention_mask) for part in parts]),
        domains=torch.tensor([names.index(part.domain_names[d]) for part in parts for d in part.domains]),
        domain_names=names,
    )


@final
@dataclass(frozen=True, slots=True)
class _Sequence:
    """Token ids of one sequence; ``answer_from`` is where its answer begins, or its length."""

    ids: tuple[int, ...]
    domain: str
    group: str
    answer_from: int

    @property
    def has_answer(self) -> bool:
        return self.answer_from < len(self.ids)


def _cut(documents: Iterable[Document], encode: Encode, length: int) -> list[_Sequence]:
    sequences: list[_Sequence] = []
    for document in documents:
        if document.prompt is not None:
            sequences += _question(document, encode, length)
            continue
        ids = encode(document.text)
        for start in range(0, len(ids), length):
            piece = tuple(ids[start : start + length])
            if len(piece) >= _SHORTEST:
                sequences.append(_Sequence(piece, document.domain, "", len(piece)))
    return sequences


def _question(document: Document, encode: Encode, length: int) -> list[_Sequence]:
    prompt = str(document.prompt)
    asked = encode(prompt)
    written = encode(document.text[len(prompt) :], begin=False)
    ids = (*asked, *written)
    if not asked or not written or len(ids) > length:
        return []
    group = document.name.split("/")[0] if document.domain == "tasks" else document.domain
    return [_Sequence(ids, document.domain, group, len(asked))]


def _parts(
    sequences: Sequence[_Sequence], num_tokens: int, favoured: Sequence[str] = ()
) -> tuple[HeldOut, ...]:
    """Plain text and questions apart (they differ in length), domains taken in turn.

    Favoured domains have as many tokens as all others together, as far as they go, and these half as many.
    """
    plain = _in_turn([s for s in sequences if not s.has_answer], lambda s: s.domain)
    asked = _in_turn([s for s in sequences if s.has_answer], lambda s: s.group)
    own = [s for s in (*asked, *plain) if s.domain in favoured]
    plain, asked = ([s for s in part if s.domain not in favoured] for part in (plain, asked))
    each = num_tokens // 2 if favoured else num_tokens
    taken = [*_take(plain, each, len(plain)), *_take(asked, each, _MOST_ANSWERS)]
    if favoured:
        room = sum(len(s.ids) for s in taken) or num_tokens
        # Whoever takes the first of them takes of both.
        taken = _in_turn([*_take(own, room, len(own)), *taken], lambda s: s.domain in favoured)
    kinds = [[s for s in taken if s.has_answer == answered] for answered in (False, True)]
    return tuple(_padded(part) for part in kinds if part)


def _in_turn(sequences: list[_Sequence], key: Any) -> list[_Sequence]:
    queues: dict[str, list[_Sequence]] = {}
    for sequence in sequences:
        queues.setdefault(key(sequence), []).append(sequence)
    taken: list[_Sequence] = []
    for turn in range(max(map(len, queues.values()), default=0)):
        taken += [queue[turn] for queue in queues.values() if turn < len(queue)]
    return taken


def _take(sequences: list[_Sequence], num_tokens: int, most: int) -> list[_Sequence]:
    taken, left = [], num_tokens
    for sequence in sequences[:most]:
        if left <= 0:
            break
        taken.append(sequence)
        left -= len(sequence.ids)
    return taken


def _padded(sequences: list[_Sequence]) -> HeldOut:
    width = max(len(s.ids) for s in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    answers = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        mask[row, : len(sequence.ids)] = 1
        answers[row, sequence.answer_from : len(sequence.ids)] = True
    names = tuple(dict.fromkeys(s.domain for s in sequences))
    return HeldOut(
        input_ids=ids,
        attention_mask=mask,
        domains=np.array([names.index(s.domain) for s in sequences]),
        domain_names=names,
        groups=tuple(s.group for s in sequences),
        answers=answers,
    )
