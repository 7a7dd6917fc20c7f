"""Skills in a row: a number goes through k small operations, to train on few at once and be tested on more.

Which sets of skills are trained on is decided by a hash of the set, so that those of the held-out stream are
never seen together in training; skills of `HELD_OUT_CATEGORY` are not seen at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Final, Literal, final

from mixtura.data.records import Task
from mixtura.errors import check_range

Stream = Literal["training", "held_out"]
HELD_OUT_CATEGORY: Final = "order"
# As many as there are skills in training.
MOST: Final = 6


@final
@dataclass(frozen=True, slots=True)
class Skill:
    """An operation on a number in [0, 99], in words with or without a second number."""

    category: str
    words: str
    apply: Callable[[int, int], int]


SKILLS: Final[Mapping[str, Skill]] = {
    "add": Skill("sums", "add {}", lambda x, a: (x + a) % 100),
    "subtract": Skill("sums", "take {} away", lambda x, a: (x - a) % 100),
    "double": Skill("sums", "double it", lambda x, a: 2 * x % 100),
    "swap": Skill("digits", "swap the digits", lambda x, a: x % 10 * 10 + x // 10),
    "total": Skill("digits", "add up the digits", lambda x, a: x // 10 + x % 10),
    "last": Skill("digits", "keep the last digit", lambda x, a: x % 10),
    "larger": Skill("order", "raise it to {} if it is less", lambda x, a: max(x, a)),
    "smaller": Skill("order", "lower it to {} if it is more", lambda x, a: min(x, a)),
    "tens": Skill("order", "round down to tens", lambda x, a: x // 10 * 10),
}
TRAINED: Final = tuple(name for name, one in SKILLS.items() if one.category != HELD_OUT_CATEGORY)
# Domains of trainings, by how many skills a text has.
DOMAINS: Final = tuple(f"chains_{k}" for k in range(1, MOST + 1))


def stream_of(names: frozenset[str]) -> Stream:
    """The stream that a set of skills belongs to; single skills are trained on, a fifth of the others is not.

    >>> stream_of(frozenset(["add"])), stream_of(frozenset(["add", "tens"]))
    ('training', 'held_out')
    """
    if not names <= set(TRAINED):
        return "held_out"
    if len(names) == 1:
        return "training"
    digest = hashlib.sha256("|".join(sorted(names)).encode()).digest()
    return "held_out" if digest[0] % 5 == 0 else "training"


def chain(num_skills: int, rng: Random, stream: Stream = "training", *, known_skills: bool = True) -> Task:
    """A task that goes through so many different skills.

    >>> chain(2, Random(3)).answer.isdigit()
    True

    Args:
        num_skills: in [1, 6].
        rng: where the skills and numbers are drawn from.
        stream: whether the set of skills is one that is trained on.
        known_skills: whether a held-out chain has single skills of the training only.

    Raises:
        SettingError: there are not so many skills.
    """
    check_range("chain", "num_skills", num_skills, 1, MOST)
    names = TRAINED if known_skills or stream == "training" else tuple(SKILLS)
    # Of one skill, and of all, there is only the set that is trained on, or none that is not.
    while True:
        chosen = rng.sample(names, num_skills)
        if num_skills in (1, len(names)) or stream_of(frozenset(chosen)) == stream:
            return _written(chosen, rng)


def chains(num_skills: int, stream: Stream, seed: int) -> Iterator[Task]:
    """An endless, reproducible stream of chains."""
    rng = Random(f"chains|{stream}|{num_skills}|{seed}")
    while True:
        yield chain(num_skills, rng, stream)


def _written(chosen: list[str], rng: Random) -> Task:
    value = rng.randrange(100)
    begin, said, steps = value, [], []
    for name in chosen:
        skill, other = SKILLS[name], rng.randrange(1, 100)
        words = skill.words.format(other)
        after = skill.apply(value, other)
        said.append(words)
        steps.append(f"{value}, {words}: {after}")
        value = after
    return Task(
        task=f"chains_{len(chosen)}",
        language="en",
        prompt=f"Question: begin with {begin}; {'; '.join(said)}\n",
        steps="\n".join(steps),
        answer_label="Answer",
        answer=str(value),
    )
