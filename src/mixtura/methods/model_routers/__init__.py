"""Choosing which whole model answers a prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
from jaxtyping import Float

from mixtura.errors import UserError
from mixtura.methods.model_routers._deciding import MOST_TOKENS, decisions, ranking
from mixtura.methods.settings import Ranged
from mixtura.report.numbers import counted
from mixtura.types.models import Decision, Lessons, ModelCard, PromptBatch, Scores, Wish

KIND = {
    "base": "ModelRouter",
    "summary": "Chooses which whole model answers a prompt.",
    "tags": {
        "dynamic_pool": "takes in a model that came later (`admit`) without changing what it says of others",
        "reads:labels": "needs what is known of a prompt beside its text (`Prompt.labels`)",
        "soft": "draws a model by probabilities of its own instead of ranking them",
        "oracle": "reads the outcomes that it is measured on: it bounds other routers, and cannot be used",
    },
}
__all__ = ["KIND", "MOST_TOKENS", "Estimate", "ModelRouter", "State", "decisions", "ranking"]
State = Mapping[str, np.ndarray]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """What a method expects of every model it learned of, in the order of `ModelRouter.models`.

    Attributes:
        quality: expected score, in [0, 1]; NaN where the method knows nothing.
        error: its standard error; NaN where the method has none.
        weights: probability of each model, for methods with the tag ``soft``.
    """

    quality: Float[np.ndarray, "P M"]
    error: Float[np.ndarray, "P M"]
    weights: Float[np.ndarray, "P M"] | None = None


class ModelRouter(Ranged, ABC):
    """Expects a score of every model for a prompt; what is preferred among them is decided here for all.

    A method learns arrays from outcomes (`learn`) and makes estimates of them (`score`). Which cards a caller
    has, in which order, what they cost, which may not be asked, what is preferred, and what is drawn at
    random are no business of a method.

    Attributes:
        least_prompts: prompts with an outcome that it takes to learn at all.
        models: names of the models it learned of, ascending.
        state: the arrays that it learned; all that it remembers, and what is saved.
    """

    least_prompts: ClassVar[int] = 1

    def __init__(self) -> None:
        self.models: tuple[str, ...] = ()
        self.state: State = {}

    @final
    def fit(self, lessons: Lessons) -> None:
        """Learn from outcomes, forgetting what was learned before.

        Raises:
            UserError: too few prompts have an outcome.
        """
        judged = ~np.isnan(lessons.scores).all(axis=1)
        if judged.sum() < self.least_prompts:
            name = type(self).__module__.rpartition(".")[2]
            raise UserError(
                f"{name} learns from {counted(self.least_prompts, 'prompt')} with a score or more, got "
                f"{int(judged.sum())}; give more outcomes, or take best_single, which needs one"
            )
        ordered = _by_name(_rows(lessons, judged))
        self.models = tuple(card.name for card in ordered.cards)
        self.state = self.learn(ordered)

    @final
    def restore(self, models: Sequence[str], state: State) -> None:
        """Be as the router was whose models and state these are."""
        self.models, self.state = tuple(models), dict(state)

    @abstractmethod
    def learn(self, lessons: Lessons) -> State:
        """The arrays that `score` needs, from outcomes of models by name ascending."""

    @abstractmethod
    def score(self, batch: PromptBatch) -> Estimate:
        """What is expected of every model in `models`; of every prompt as if it were alone."""

    def admit(self, lessons: Lessons) -> None:
        """Take in models that came later; only a method with the tag ``dynamic_pool`` can.

        Args:
            lessons: outcomes of the new models alone.

        Raises:
            UserError: the method cannot.
        """
        del lessons
        name = type(self).__module__.rpartition(".")[2]
        raise UserError(f"{name} cannot take in a model that came later; fit it again on a table that has it")

    @final
    def estimate(
        self, batch: PromptBatch, cards: Sequence[ModelCard], costs: Float[np.ndarray, "P M"]
    ) -> Scores:
        """What is expected of the models of these cards, in their order; NaN for those not learned of.

        Args:
            batch: the prompts.
            cards: models, in any order.
            costs: expected cost of each card, in pico-dollars; NaN where it is not known.
        """
        if not self.models:
            name = type(self).__module__.rpartition(".")[2]
            raise UserError(f"{name} has learned nothing yet; fit it on outcomes first")
        found = self.score(batch)
        places = {name: number for number, name in enumerate(self.models)}
        columns = [places.get(card.name) for card in cards]
        weights = None if found.weights is None else _picked(found.weights, columns, 0.0)
        return Scores(_picked(found.quality, columns), _picked(found.error, columns), costs, weights)

    @final
    def decide(
        self,
        batch: PromptBatch,
        cards: Sequence[ModelCard],
        costs: Float[np.ndarray, "P M"],
        wish: Wish | None = None,
        seed: int = 0,
    ) -> list[Decision]:
        """Choose a model for each prompt.

        Args:
            batch: the prompts.
            cards: models, in any order.
            costs: expected cost of each card, in pico-dollars; NaN where it is not known.
            wish: what is preferred.
            seed: of what is drawn at random; with a prompt's id it settles the draw.

        Raises:
            UserError: a wish about money, and no cost is known; or nothing was learned yet.
        """
        return decisions(batch.prompts, cards, self.estimate(batch, cards, costs), wish or Wish(), seed)


def _picked(
    values: Float[np.ndarray, "P M"], columns: Sequence[int | None], missing: float = np.nan
) -> Float[np.ndarray, "P N"]:
    out = np.full((len(values), len(columns)), missing)
    for place, column in enumerate(columns):
        if column is not None:
            out[:, place] = values[:, column]
    return out


def _rows(lessons: Lessons, kept: np.ndarray) -> Lessons:
    prompts = tuple(one for one, keep in zip(lessons.batch.prompts, kept, strict=True) if keep)
    batch = PromptBatch(prompts, lessons.batch.embeddings[kept])
    return Lessons(batch, lessons.cards, lessons.scores[kept], lessons.costs[kept])


def _by_name(lessons: Lessons) -> Lessons:
    """Models by name and prompts by id, so that no order of a table can matter."""
    models = sorted(range(len(lessons.cards)), key=lambda number: lessons.cards[number].name)
    order = sorted(range(len(lessons.batch)), key=lambda number: lessons.batch.prompts[number].id)
    grid = np.ix_(order, models)
    return Lessons(
        PromptBatch(tuple(lessons.batch.prompts[n] for n in order), lessons.batch.embeddings[order]),
        tuple(lessons.cards[n] for n in models),
        lessons.scores[grid],
        lessons.costs[grid],
    )
