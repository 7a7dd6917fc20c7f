"""Tasks made by seeded generators: worked steps, checkable answers, four languages.

Which stream a problem belongs to (training, calibration, held out) is decided by a hash of the
problem itself, in no language, so that the streams are disjoint whatever their seeds and lengths,
and a held-out sum is not seen in training in another language either.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from random import Random
from typing import Literal

from mixtura.data._tasks_arithmetic import ARITHMETIC
from mixtura.data._tasks_words import WORDS
from mixtura.data.languages import LANGUAGES
from mixtura.data.records import Task
from mixtura.errors import SettingError, UnknownNameError

GENERATORS = {**ARITHMETIC, **WORDS}
TASKS = tuple(GENERATORS)
LARGEST = 99

Split = Literal["training", "calibration", "held_out"]
SPLITS: tuple[Split, ...] = ("training", "calibration", "held_out")


def split_of(task: str, key: str) -> Split:
    """The stream a problem belongs to: 80 % training, 10 % calibration, 10 % held out."""
    digest = hashlib.sha256(f"{task}|{key}".encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % 10
    return "held_out" if bucket == 0 else "calibration" if bucket == 1 else "training"


def make_task(
    task: str, language: str, rng: Random, *, split: Split = "training", largest: int = LARGEST
) -> Task:
    """One task of a stream.

    Args:
        task: one of `TASKS`.
        language: a code of `LANGUAGES`.
        rng: where its numbers, words and wording are drawn from.
        split: the stream; problems of other streams are drawn again.
        largest: the largest operand, at least 9; small values give easier problems.

    Raises:
        UnknownNameError: for an unknown task or language.
        SettingError: for `largest` below 9.
    """
    if task not in GENERATORS:
        raise UnknownNameError("task", task, TASKS)
    if language not in LANGUAGES:
        raise UnknownNameError("language", language, LANGUAGES)
    if largest < 9:
        raise SettingError(f"largest of make_task must be at least 9, got {largest}")
    words = LANGUAGES[language]
    while True:
        problem = GENERATORS[task](rng, words, largest)
        if split_of(task, problem.key) == split:
            break
    return Task(
        task=task,
        language=language,
        prompt=f"{words.question}: {problem.question}\n",
        steps=problem.steps,
        answer_label=words.answer,
        answer=problem.answer,
    )


def language_weights(languages: Sequence[str]) -> list[float]:
    """How often each language is drawn: the first twice as often as each other."""
    return [2.0] + [1.0] * (len(languages) - 1)


def stream(
    split: Split,
    seed: int,
    *,
    tasks: tuple[str, ...] = TASKS,
    languages: tuple[str, ...] = tuple(LANGUAGES),
    largest: int = LARGEST,
) -> Iterator[Task]:
    """An endless, reproducible stream of tasks; the first language comes twice as often as each other."""
    rng = Random(f"{split}|{seed}")
    weights = language_weights(languages)
    while True:
        task = rng.choice(tasks)
        language = rng.choices(languages, weights)[0]
        yield make_task(task, language, rng, split=split, largest=largest)


def sample(split: Split, num_per_task: int, seed: int = 0) -> tuple[Task, ...]:
    """Different tasks of a stream, the same number for each kind, languages in turn.

    A kind with fewer different questions than asked for gives all that were found.
    """
    found: list[Task] = []
    codes = tuple(LANGUAGES)
    for task in TASKS:
        rng = Random(f"{split}|{task}|{seed}")
        seen: set[str] = set()
        for _ in range(num_per_task * 20):
            if len(seen) == num_per_task:
                break
            made = make_task(task, codes[len(seen) % len(codes)], rng, split=split)
            if made.prompt in seen:
                continue
            seen.add(made.prompt)
            found.append(made)
    return tuple(found)


@cache
def chance_level(task: str, language: str) -> float:
    """How often the best constant answer is right, measured on 2,000 training tasks."""
    rng = Random(f"chance|{task}|{language}")
    answers = Counter(make_task(task, language, rng).answer for _ in range(2000))
    return answers.most_common(1)[0][1] / 2000
