"""Training what an ensemble trains, stage by stage, while the models it is of stay frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import nn

from mixtura.errors import UserError, check_range
from mixtura.methods import declared_tags
from mixtura.methods.ensembles import Ensemble, Lesson, chosen
from mixtura.running.ensembling.lessons import Pair, Row, in_turn, lesson_of
from mixtura.running.ensembling.team import Team, frozen

OnStep = Callable[[str, int, float], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How to train.

    Attributes:
        steps: of each stage.
        batch: rows, or pairs, of a step.
        learning_rate: of the method's parts.
        own_learning_rate: of a model of its own.
        seed: of what parts begin as, of the order of texts and of what is drawn.
    """

    steps: int = 100
    batch: int = 8
    learning_rate: float = 1e-3
    own_learning_rate: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        check_range("Training", "steps", self.steps, 1, 1 << 40)
        check_range("Training", "batch", self.batch, 1, 1 << 20)
        check_range("Training", "learning_rate", self.learning_rate, 0.0, 10.0)
        check_range("Training", "own_learning_rate", self.own_learning_rate, 0.0, 10.0)
        check_range("Training", "seed", self.seed, 0, (1 << 63) - 1)


@final
@dataclass(frozen=True, slots=True)
class Stage:
    """What came of a stage: its name, and the mean loss of the first and of the last tenth of its steps."""

    name: str
    first: float
    last: float


def train(
    ensemble: Ensemble,
    team: Team,
    rows: Sequence[Row],
    how: Training | None = None,
    pairs: Sequence[Pair] = (),
    on_step: OnStep | None = None,
) -> list[Stage]:
    """Build and train the parts of an ensemble; a stage that learns from pairs is left out without any.

    The team must have a model of the method's own where it needs one; see `Team.with_own`.

    Raises:
        UserError: the method trains nothing, pairs are given to one that learns from none, or a loss is no
            number.
    """
    how = how or Training()
    tags, name = declared_tags(type(ensemble)), type(ensemble).__name__
    if "trained" not in tags:
        raise UserError(f"{name} trains nothing; use it as it is")
    if pairs and "pairs" not in tags:
        raise UserError(f"{name} learns from no pairs; leave them out")
    with torch.random.fork_rng(devices=[]), frozen(team):
        torch.manual_seed(how.seed)
        ensemble.build(team.facts)
        made = []
        for stage in ensemble.stages:
            in_pairs = "pairs" in tags and stage == ensemble.stages[-1]
            if in_pairs and not pairs:
                continue
            lessons = _of_pairs(ensemble, team, pairs, how) if in_pairs else _of_rows(team, rows, how)
            made.append(_stage(ensemble, team, stage, lessons, how, on_step))
    ensemble.eval()
    return made


def _stage(
    ensemble: Ensemble,
    team: Team,
    stage: str,
    lessons: Iterator[list[Lesson]],
    how: Training,
    on_step: OnStep | None,
) -> Stage:
    groups: list[dict[str, Any]] = [{"params": list(ensemble.learns(stage)), "lr": how.learning_rate}]
    if team.own is not None:
        groups.append({"params": list(team.own.parameters()), "lr": how.own_learning_rate})
    trained = [one for group in groups for one in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    losses = []
    ensemble.train()
    for step in range(how.steps):
        loss = ensemble.loss(stage, next(lessons))
        if not bool(loss.isfinite()):
            raise UserError(
                f"the loss of {stage} is {float(loss)} at step {step + 1}; take a lower learning rate"
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            # Down to nothing in a line, so that the end does not depend on the last texts.
            group["lr"] = groups_rate(group, how.steps, step)
        optimizer.step()
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(stage, step + 1, losses[-1])
    tenth = max(1, how.steps // 10)
    return Stage(stage, sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth)


def groups_rate(group: dict[str, Any], steps: int, step: int) -> float:
    """The learning rate of a group at a step: a line from what it began with to nothing."""
    first: float = group.setdefault("first_lr", group["lr"])
    return first * (1 - step / steps)


def _of_rows(team: Team, rows: Sequence[Row], how: Training) -> Iterator[list[Lesson]]:
    if not rows:
        raise UserError("there is no text to learn from; give some")
    for batch in in_turn(rows, how.batch, how.seed):
        yield [lesson_of(batch, team)]


def _of_pairs(ensemble: Ensemble, team: Team, pairs: Sequence[Pair], how: Training) -> Iterator[list[Lesson]]:
    """Pairs in turn, with how probable both answers were before the stage."""
    ensemble.eval()
    before = []
    with torch.no_grad():
        for one in pairs:
            lessons = [lesson_of([side], team) for side in (one.preferred, one.other)]
            before.append([_log_probability(ensemble, lesson) for lesson in lessons])
    known = list(zip(pairs, before, strict=True))

    def drawn() -> Iterator[list[Lesson]]:
        for batch in in_turn(known, how.batch, how.seed):
            sides = ([one.preferred for one, _ in batch], [one.other for one, _ in batch])
            yield [
                replace(lesson_of(rows, team), before=torch.cat([found[side] for _, found in batch]))
                for side, rows in enumerate(sides)
            ]

    return drawn()


def _log_probability(ensemble: Ensemble, lesson: Lesson) -> torch.Tensor:
    return chosen(ensemble(lesson.text).log_probabilities, lesson.targets).sum(1)
