"""The cheapest model for everything."""

from __future__ import annotations

from typing import final

import numpy as np

from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._shared import unknown
from mixtura.types.models import Lessons, PromptBatch

METHOD = {"paper": None, "title": "Cheapest model", "tags": ["dynamic_pool"]}


@final
class Cheapest(ModelRouter):
    """Send every prompt to the cheapest model that may answer it.

    The left end of every curve of quality over cost. It expects the same of every model, the mean of all
    scores, so that the cheaper is always preferred.

    Shapes:
        Scores [P, M] to one number.

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> batch = PromptBatch((Prompt(id="0"),), np.ones((1, 1)))
        >>> cards = (ModelCard(name="a"), ModelCard(name="b"))
        >>> router = Cheapest()
        >>> router.fit(Lessons(batch, cards, np.array([[1.0, 0.0]]), np.ones((1, 2))))
        >>> [router.decide(batch, cards, np.array([[price, 2.0]]))[0].model for price in (1.0, 3.0)]
        ['a', 'b']
    """

    def learn(self, lessons: Lessons) -> State:
        return {"mean": np.array([np.nanmean(lessons.scores)])}

    def score(self, batch: PromptBatch) -> Estimate:
        shape = (len(batch), len(self.models))
        return Estimate(np.full(shape, self.state["mean"][0]), unknown(*shape))

    def admit(self, lessons: Lessons) -> None:
        self.models += tuple(card.name for card in lessons.cards)
