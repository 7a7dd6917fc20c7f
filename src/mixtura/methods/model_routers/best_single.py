"""One model for everything: the best so far."""

from __future__ import annotations

from typing import final

import numpy as np

from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._shared import mean_scores
from mixtura.types.models import Lessons, PromptBatch

METHOD = {"paper": None, "title": "Best single model", "tags": ["dynamic_pool"]}


@final
class BestSingle(ModelRouter):
    """Send every prompt to the model of the best mean score, whatever the prompt.

    What any router must beat. With a price for quality, or a limit on cost, it is the best single model under
    that wish; mixing two of these is the zero router.

    Shapes:
        Scores [P, M] to a mean for each of M models.

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> batch = PromptBatch(tuple(Prompt(id=str(n)) for n in range(4)), np.ones((4, 1)))
        >>> scores = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, np.nan]])
        >>> router = BestSingle()
        >>> router.fit(Lessons(batch, (ModelCard(name="a"), ModelCard(name="b")), scores, scores))
        >>> router.score(batch).quality[0].round(2).tolist()
        [0.75, 0.33]
    """

    def learn(self, lessons: Lessons) -> State:
        mean, error = mean_scores(lessons.scores)
        return {"mean": mean, "error": error}

    def score(self, batch: PromptBatch) -> Estimate:
        shape = (len(batch), len(self.models))
        return Estimate(*(np.broadcast_to(self.state[key], shape).copy() for key in ("mean", "error")))

    def admit(self, lessons: Lessons) -> None:
        mean, error = mean_scores(lessons.scores)
        self.state = {
            "mean": np.append(self.state["mean"], mean),
            "error": np.append(self.state["error"], error),
        }
        self.models += tuple(card.name for card in lessons.cards)
