"""Any model, with equal chances."""

from __future__ import annotations

from typing import final

import numpy as np

from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._shared import mean_scores
from mixtura.types.models import Lessons, PromptBatch

METHOD = {"paper": None, "title": "Random model", "tags": ["dynamic_pool", "soft"]}


@final
class Random(ModelRouter):
    """Draw a model for every prompt, each that may answer it with the same probability.

    What a router of no use does, and the policy whose logs say most about all others.

    Shapes:
        Weights [P, M], all 1 / M.

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> batch = PromptBatch((Prompt(id="0"),), np.ones((1, 1)))
        >>> cards = (ModelCard(name="a"), ModelCard(name="b"))
        >>> router = Random()
        >>> router.fit(Lessons(batch, cards, np.array([[1.0, 0.0]]), np.ones((1, 2))))
        >>> dict(router.decide(batch, cards, np.ones((1, 2)))[0].propensities)
        {'a': 0.5, 'b': 0.5}
    """

    def learn(self, lessons: Lessons) -> State:
        mean, error = mean_scores(lessons.scores)
        return {"mean": mean, "error": error}

    def score(self, batch: PromptBatch) -> Estimate:
        shape = (len(batch), len(self.models))
        mean, error = (np.broadcast_to(self.state[key], shape).copy() for key in ("mean", "error"))
        return Estimate(mean, error, np.full(shape, 1 / len(self.models)))

    def admit(self, lessons: Lessons) -> None:
        mean, error = mean_scores(lessons.scores)
        self.state = {
            "mean": np.append(self.state["mean"], mean),
            "error": np.append(self.state["error"], error),
        }
        self.models += tuple(card.name for card in lessons.cards)
