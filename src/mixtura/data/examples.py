"""Read a user's records as examples to learn from: tokens, and which of them the loss is over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from mixtura.data.reading import entries
from mixtura.data.records import Document, TextError
from mixtura.data.shapes import conversation_of, document_of, word_chat
from mixtura.data.tokens import check_ids, encode_text

_ASSISTANT = ("assistant", "model")


@final
@dataclass(frozen=True, slots=True)
class Example:
    """One document to learn from.

    Attributes:
        ids: its tokens, an end token included.
        learned: True for tokens that are to be predicted.
    """

    ids: NDArray[np.int64]
    learned: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, start: int, stop: int) -> Example:
        """The tokens from one place to before another."""
        return Example(self.ids[start:stop], self.learned[start:stop])


def read_examples(
    path: str | Path, tokenizer: Any, num_embeddings: int | None = None, *, answers_only: bool = True
) -> tuple[Example, ...]:
    """The examples of a file or directory; records are those that `mixtura.data.reading.read` knows.

    With ``answers_only`` what is learned of a conversation are the assistant's turns, of a question its
    answer, and of plain text all of it; else all of everything. An end token follows what ends in none.

    Raises:
        TextError: the path is missing, a record is malformed, the model has no chat template that takes it or
            no embedding for its tokens, or nothing is there to learn.
    """
    made = []
    for entry in entries(path):
        if isinstance(entry.value, str):
            document = Document(entry.value, entry.domain, entry.name)
            example = _of_document(document, tokenizer, answers_only)
        else:
            # Says what is wrong with the record before it is taken apart.
            known = entry.value if isinstance(entry.value, dict) else {}
            turns = conversation_of(known, entry.where)
            if turns is None:
                found = document_of(entry.value, entry.domain, entry.name, entry.where, tokenizer)
                example = _of_document(found, tokenizer, answers_only)
            else:
                example = _of_turns(turns, tokenizer, entry.where, answers_only)
        check_ids(example.ids.tolist(), tokenizer, num_embeddings)
        made.append(example)
    if not any(example.learned[1:].any() for example in made):
        raise TextError(
            f'{path} has no answers to learn from; give records with "messages" in which the assistant '
            'speaks, with "prompt" and "completion", or with "text"'
        )
    return tuple(made)


def digest_of(examples: Sequence[Example]) -> str:
    """A digest of all that is learned from."""
    total = hashlib.sha256()
    for example in examples:
        total.update(f"{len(example)}|".encode())
        total.update(example.ids.tobytes())
        total.update(example.learned.tobytes())
    return total.hexdigest()


def _of_document(document: Document, tokenizer: Any, answers_only: bool) -> Example:
    if document.prompt is None or not answers_only:
        ids = encode_text(document.text, tokenizer)
        return _ended(ids, [True] * len(ids), tokenizer)
    spans = [(len(document.prompt), len(document.text))]
    return _by_spans(document.text, spans, tokenizer, begin=True)


def _of_turns(turns: Sequence[Mapping[str, Any]], tokenizer: Any, where: str, answers_only: bool) -> Example:
    text = word_chat(turns, tokenizer, where)
    spans = list(_answers(turns, text, tokenizer, where)) if answers_only else [(0, len(text))]
    return _by_spans(text, spans, tokenizer, begin=False)


def _answers(
    turns: Sequence[Mapping[str, Any]], text: str, tokenizer: Any, where: str
) -> Iterator[tuple[int, int]]:
    """Where in a worded conversation the assistant's turns stand, from after what asks for them.

    A template may word earlier turns otherwise once others follow, such as leaving out their reasoning; those
    are not learned from. The last one's must be found.
    """
    places = [number for number, turn in enumerate(turns) if turn["role"] in _ASSISTANT]
    for number in places:
        last = number == places[-1]
        before = word_chat(turns[:number], tokenizer, where, add_generation_prompt=True) if number else ""
        through = word_chat(turns[: number + 1], tokenizer, where)
        if text.startswith(before) and text.startswith(through) and len(before) < len(through):
            yield len(before), len(through)
        elif last:
            raise TextError(
                f"the chat template words the conversation in {where} so that the last answer cannot be told "
                'apart; give "prompt" and "completion", worded as the model expects, or learn from all of it'
            )


def _by_spans(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any, *, begin: bool) -> Example:
    """A text's tokens, those learned that end within one of the spans of characters."""
    bos = getattr(tokenizer, "bos_token", None)
    special = begin and not (bos and text.startswith(str(bos)))
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ends = [stop if stop > start else 0 for start, stop in encoded["offset_mapping"]]
    learned = [any(start < end <= stop for start, stop in spans) for end in ends]
    return _ended(encoded["input_ids"], learned, tokenizer)


def _ended(ids: Sequence[int], learned: Sequence[bool], tokenizer: Any) -> Example:
    """The example with an end token, learned if what comes before it is, where it ends in none."""
    found, known = list(ids), list(learned)
    end = tokenizer.eos_token_id
    closed = bool(found) and (found[-1] == end or (found[-1] in set(tokenizer.all_special_ids) and known[-1]))
    if end is not None and found and not closed:
        found.append(int(end))
        known.append(known[-1])
    return Example(np.asarray(found, dtype=np.int64), np.asarray(known, dtype=np.bool_))
