"""A curriculum: stage by stage, each domain's share of the sequences and the tasks that are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from mixtura.data.languages import LANGUAGES
from mixtura.data.tasks import LARGEST, TASKS, language_weights, make_task
from mixtura.data.tokens import encode_text
from mixtura.errors import SettingError, UnknownNameError, check_range
from mixtura.train.text import Stream, Windows, item

MADE = "tasks"
# Multiples of the golden ratio's fraction fill [0, 1) evenly from the first on.
_GOLDEN = 0.6180339887498949


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stretch of a curriculum.

    Attributes:
        shares: of the sequences, by domain; they sum to 1.
        until: the step before which it ends; null for the last stage.
        tasks: how often each kind of task is made for the domain "tasks"; all equally where empty.
        largest: the largest number in them.
        rehearsal: how much of what earlier stages read is read again, as a fraction of it: so many sequences
            of this stage have their domains, and the rest those of ``shares``.
    """

    shares: dict[str, float]
    until: int | None = None
    tasks: dict[str, int] = field(default_factory=dict)
    largest: int = LARGEST
    rehearsal: float = 0.0

    def __post_init__(self) -> None:
        for name, share in self.shares.items():
            check_range("a stage", f"the share of {name}", share, 0, 1)
        if abs(sum(self.shares.values()) - 1) > 1e-6:
            raise SettingError(f"the shares of a stage must sum to 1, got {sum(self.shares.values()):g}")
        for name, weight in self.tasks.items():
            if name not in TASKS:
                raise UnknownNameError("task", name, TASKS)
            check_range("a stage", f"the weight of the task {name}", weight, 1, 1 << 20)
        check_range("a stage", "largest", self.largest, 9, 1 << 30)
        check_range("a stage", "rehearsal", self.rehearsal, 0, 1)


def check_stages(stages: Sequence[Stage]) -> None:
    """Raise `SettingError` unless each stage but the last ends, and later than the one before."""
    ends = [stage.until for stage in stages]
    known = [end for end in ends[:-1] if end is not None]
    if stages and (ends[-1] is not None or len(known) < len(ends) - 1 or known != sorted({*known})):
        raise SettingError(
            f"each stage but the last needs a later step in until than the one before, got {ends}; "
            "the last has none"
        )


def rehearsed(stages: Sequence[Stage], num_steps: int) -> tuple[Stage, ...]:
    """The stages with shares of all that they read, what is rehearsed among them.

    >>> first, second = Stage(shares={"code": 1.0}, until=60), Stage(shares={"prose": 1.0}, rehearsal=0.25)
    >>> rehearsed([first, second], 160)[1].shares
    {'prose': 0.85, 'code': 0.15}

    Raises:
        SettingError: the first stage rehearses, or one has fewer steps than it is to rehearse.
    """
    made: list[Stage] = []
    read: dict[str, float] = {}
    start = 0
    for stage in stages:
        end = num_steps if stage.until is None else min(stage.until, num_steps)
        length, again = end - start, stage.rehearsal * start
        if stage.rehearsal and not start:
            raise SettingError("the first stage has nothing to rehearse; leave its rehearsal out")
        if again > length:
            raise SettingError(
                f"rehearsal {stage.rehearsal:g} of {start} earlier steps takes {again:g} steps, but its "
                f"stage has {length}; lower it, or give the stage more steps"
            )
        part = again / length if again else 0.0
        shares = {name: share * (1 - part) for name, share in stage.shares.items()}
        for name, steps in read.items():
            shares[name] = shares.get(name, 0.0) + part * steps / max(start, 1)
        shares = {name: share for name, share in shares.items() if share or name in stage.shares}
        made.append(replace(stage, shares=shares))
        for name, share in shares.items():
            read[name] = read.get(name, 0.0) + share * length
        start = max(start, end)
    return tuple(made)


@final
class StagedSequences(Dataset[dict[str, Any]]):
    """Training sequences by number after a curriculum: the same whatever was read before.

    Domains are spread evenly within each stage. Sequences of the domain "tasks" hold one made task after
    another; those of the others are windows of a stream of text. Items are those of
    `mixtura.train.text.Sequences`.

    Args:
        streams: text by domain.
        stages: the curriculum.
        tokenizer: of the made tasks.
        num_sequences: of the whole training.
        per_step: sequences of a step, which tells the stage of a sequence.
        length: tokens of a sequence.
        start_id: the token that begins a document, where documents are told apart.
        seed: of the order and of the tasks.

    Raises:
        UnknownNameError: a stage has a share of a domain that is neither among the streams nor "tasks".
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        stages: Sequence[Stage],
        tokenizer: Any,
        *,
        num_sequences: int,
        per_step: int,
        length: int,
        start_id: int | None = None,
        seed: int = 0,
    ) -> None:
        self.domains = (*(name for name in streams if name != MADE), MADE)
        for stage in stages:
            for name in stage.shares:
                if name not in self.domains:
                    raise UnknownNameError("domain", name, self.domains)
        self._stages, self._tokenizer = rehearsed(stages, num_sequences // per_step), tokenizer
        self._per_step, self._length, self._start_id, self._seed = per_step, length, start_id, seed
        self._places = _spread(self._stages, self.domains, num_sequences, per_step)
        # Of each sequence, how many of its domain came before: the window that it reads.
        self._ranks = np.zeros_like(self._places)
        for place in range(len(self.domains)):
            mine = self._places == place
            self._ranks[mine] = np.arange(int(mine.sum()))
        used = {self.domains[place] for place in np.unique(self._places).tolist()}
        self._windows = {
            name: Windows(streams[name], length, (seed, place))
            for place, name in enumerate(self.domains)
            if name != MADE and name in used
        }

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> dict[str, Any]:
        place = int(self._places[number])
        name = self.domains[place]
        if name == MADE:
            tokens = self._made(stage_of(self._stages, number // self._per_step), number)
        else:
            tokens = self._windows[name][int(self._ranks[number])]
        return item(tokens, place, self._start_id)

    def _made(self, stage: Stage, number: int) -> Stream:
        rng = Random(f"{self._seed}|{number}")
        weights = stage.tasks or dict.fromkeys(TASKS, 1)
        codes = tuple(LANGUAGES)
        tokens: list[int] = []
        while len(tokens) <= self._length:
            (language,) = rng.choices(codes, language_weights(codes))
            (name,) = rng.choices(tuple(weights), tuple(weights.values()))
            task = make_task(name, language, rng, largest=stage.largest)
            tokens += encode_text(task.prompt + task.completion, self._tokenizer)
        return np.asarray(tokens[: self._length + 1], dtype=np.int64)


def stage_of(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that a step belongs to."""
    return next(stage for stage in stages if stage.until is None or step < stage.until)


def places_of(shares: Sequence[float], start: int, end: int) -> NDArray[np.int64]:
    """Which of several domains each of some sequences is of, spread evenly: places by sequences' numbers.

    >>> places_of([0.5, 0.25, 0.25], 0, 8).tolist()
    [1, 0, 2, 0, 0, 1, 0, 2]
    """
    points = (np.arange(start, max(start, end)) + 1) * _GOLDEN % 1.0
    return np.searchsorted(np.cumsum(shares)[:-1], points, side="right").astype(np.int64)


def _spread(
    stages: Sequence[Stage], domains: Sequence[str], num_sequences: int, per_step: int
) -> NDArray[np.int64]:
    """The domain of every sequence, as its place among the domains."""
    places = np.zeros(num_sequences, dtype=np.int64)
    start = 0
    for stage in stages:
        end = num_sequences if stage.until is None else min(stage.until * per_step, num_sequences)
        places[start:end] = places_of([stage.shares.get(name, 0.0) for name in domains], start, end)
        start = max(start, end)
    return places
