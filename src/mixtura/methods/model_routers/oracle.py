"""The best model for each prompt, known afterwards."""

from __future__ import annotations

from typing import final

import numpy as np

from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._shared import bytes_as_words, mean_scores, numbered, words_as_bytes
from mixtura.types.models import Lessons, PromptBatch

METHOD = {"paper": None, "title": "Best choice in hindsight", "tags": ["oracle"]}


@final
class Oracle(ModelRouter):
    """Know the outcome of every prompt that it was fitted on, and choose by it.

    The most that any router can reach on these prompts. Where answers are guessed among a few options it
    counts lucky guesses of any of many models as knowledge, so it is a bound and no aim.

    Shapes:
        Scores [P, M], kept as they are.

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> batch = PromptBatch((Prompt(id="0"), Prompt(id="1")), np.ones((2, 1)))
        >>> cards = (ModelCard(name="a"), ModelCard(name="b"))
        >>> router = Oracle()
        >>> router.fit(Lessons(batch, cards, np.array([[1.0, 0.0], [0.0, 1.0]]), np.ones((2, 2))))
        >>> [one.model for one in router.decide(batch, cards, np.ones((2, 2)))]
        ['a', 'b']
    """

    def learn(self, lessons: Lessons) -> State:
        mean, _ = mean_scores(lessons.scores)
        ids = words_as_bytes([prompt.id for prompt in lessons.batch.prompts])
        return {"scores": np.concatenate([lessons.scores, mean[None]]), "ids": ids}

    def score(self, batch: PromptBatch) -> Estimate:
        rows = numbered([prompt.id for prompt in batch.prompts], bytes_as_words(self.state["ids"]))
        quality = self.state["scores"][rows]
        return Estimate(quality, np.where(np.isnan(quality), np.nan, 0.0))
