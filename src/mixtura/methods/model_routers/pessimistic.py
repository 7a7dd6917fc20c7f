"""What is surely good, from logs in which some models were hardly tried."""

from __future__ import annotations

import math
from typing import final

import numpy as np

from mixtura.errors import check_range
from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._shared import clusters, nearest_centre
from mixtura.types.models import Lessons, PromptBatch

METHOD = {
    "paper": 189,
    "title": "Bridging Offline Reinforcement Learning and Imitation Learning: A Tale of Pessimism",
}


@final
class Pessimistic(ModelRouter):
    """Choose by a lower bound on each model's score, so that what was hardly tried is not chosen by luck.

    Learns from the logs of any policy. Contexts are clusters of prompts; in each, a model's value is its mean
    score less a penalty that falls with the number of times it was tried there. A model never tried in a
    context is worth nothing there. Where the logs come from an expert this imitates it; where they cover
    everything it becomes the greedy choice.

    Shapes:
        Embeddings [P, C] to P contexts; scores [P, M] to bounds [contexts, M].

    Raises:
        SettingError: ``num_contexts`` is outside [1, 10000], ``scale`` outside [0, 10] or ``failure`` outside
            (0, 1).

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> batch = PromptBatch(tuple(Prompt(id=str(n)) for n in range(41)), np.ones((41, 1)))
        >>> scores = np.array([[0.8, np.nan]] * 40 + [[np.nan, 1.0]])
        >>> router = Pessimistic()
        >>> router.fit(Lessons(batch, (ModelCard(name="a"), ModelCard(name="b")), scores, scores))
        >>> router.score(batch).quality[0].round(2).tolist()
        [0.59, 0.0]

    Differences from the paper:
        For bandits, not for Markov decisions: one choice a prompt. The penalty is that of Hoeffding's
        inequality, ``min(1, scale * sqrt(log(2 * contexts * models / failure) / (2 * count)))``; the paper's
        has constants that its proof needs, so ``scale`` is a setting. Contexts are clusters of prompts, for
        the paper they are given. The published algorithm splits the data by step of the horizon, of which
        there is one. The bound is floored at 0.

    Reference:
        Bridging Offline Reinforcement Learning and Imitation Learning: A Tale of Pessimism (paper 189).
    """

    def __init__(
        self, *, num_contexts: int = 20, scale: float = 1.0, failure: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__()
        check_range(type(self).__name__, "num_contexts", num_contexts, 1, 10_000)
        check_range(type(self).__name__, "scale", scale, 0, 10)
        check_range(type(self).__name__, "failure", failure, 1e-12, 1 - 1e-12)
        self.num_contexts = num_contexts
        self.scale = scale
        self.failure = failure
        self.seed = seed

    def learn(self, lessons: Lessons) -> State:
        centres = clusters(lessons.batch.embeddings, self.num_contexts, self.seed)
        near = nearest_centre(lessons.batch.embeddings, centres)
        seen = ~np.isnan(lessons.scores)
        total, count = np.zeros((2, len(centres), lessons.scores.shape[1]))
        np.add.at(total, near, np.where(seen, lessons.scores, 0.0))
        np.add.at(count, near, seen.astype(float))
        spread = math.log(2 * count.size / self.failure)
        penalty = np.minimum(1.0, self.scale * np.sqrt(spread / (2 * np.maximum(count, 1))))
        mean = total / np.maximum(count, 1)
        bound = np.where(count > 0, np.maximum(mean - penalty, 0.0), 0.0)
        return {"centres": centres, "bound": bound}

    def score(self, batch: PromptBatch) -> Estimate:
        quality = self.state["bound"][nearest_centre(batch.embeddings, self.state["centres"])]
        # What is uncertain has been taken off already.
        return Estimate(quality, np.zeros_like(quality))
