"""A logistic regression for every model."""

from __future__ import annotations

from typing import final

import numpy as np

from mixtura.errors import check_range
from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._heads import fit_heads, head_errors
from mixtura.methods.model_routers._shared import sigmoid, with_ones
from mixtura.types.models import Lessons, PromptBatch

METHOD = {"paper": None, "title": "Logistic regression", "tags": ["dynamic_pool"]}


@final
class Logistic(ModelRouter):
    """Predict the score of every model by a logistic regression of its own on the prompt's embedding.

    Heads know nothing of each other, so a model that comes later gets a head without changing others.

    Shapes:
        Embeddings [P, C] and weights [C + 1, M] to scores [P, M].

    Raises:
        SettingError: ``decay`` is outside [1e-6, 100].

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> batch = PromptBatch(tuple(Prompt(id=str(n)) for n in range(4)), np.eye(2)[[0, 0, 1, 1]])
        >>> scores = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> router = Logistic(decay=0.01)
        >>> router.fit(Lessons(batch, (ModelCard(name="a"), ModelCard(name="b")), scores, scores))
        >>> (router.score(batch).quality[[0, 3]] > 0.8).tolist()
        [[True, False], [False, True]]
    """

    def __init__(self, *, decay: float = 0.001) -> None:
        super().__init__()
        check_range(type(self).__name__, "decay", decay, 1e-6, 100)
        self.decay = decay

    def learn(self, lessons: Lessons) -> State:
        weights, curvature = fit_heads(with_ones(lessons.batch.embeddings), lessons.scores, self.decay)
        return {"weights": weights, "curvature": curvature}

    def score(self, batch: PromptBatch) -> Estimate:
        points = with_ones(batch.embeddings)
        quality = sigmoid(points @ self.state["weights"])
        return Estimate(quality, head_errors(points, quality, self.state["curvature"]))

    def admit(self, lessons: Lessons) -> None:
        more = self.learn(lessons)
        self.state = {key: np.concatenate([self.state[key], more[key]], axis=1) for key in more}
        self.models += tuple(card.name for card in lessons.cards)
