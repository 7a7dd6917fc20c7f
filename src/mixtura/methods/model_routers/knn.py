"""What models did on the prompts most like this one."""

from __future__ import annotations

from typing import final

import numpy as np

from mixtura.errors import check_range
from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._shared import binomial_error, filled, mean_scores, neighbours
from mixtura.types.models import Lessons, PromptBatch

METHOD = {"paper": None, "title": "Nearest neighbours"}


@final
class Knn(ModelRouter):
    """Expect of each model its mean score on the most similar prompts with known outcomes.

    Neighbours are found by cosine of embeddings. The mean is drawn to the model's own over all prompts, as by
    ``prior`` more outcomes, so that a model seen on one neighbour only is not taken at its word. Simple, and
    hard to beat by routers that are trained.

    Shapes:
        Embeddings [P, C] against those of the N known prompts to scores [P, M].

    Raises:
        SettingError: ``num_neighbours`` is outside [1, 100000], or ``prior`` outside [0, 1000].

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> batch = PromptBatch(tuple(Prompt(id=str(n)) for n in range(4)), np.eye(2)[[0, 0, 1, 1]])
        >>> scores = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> router = Knn(num_neighbours=2, prior=2.0)
        >>> router.fit(Lessons(batch, (ModelCard(name="a"), ModelCard(name="b")), scores, scores))
        >>> [[float(one) for one in row] for row in router.score(batch).quality[[0, 3]]]
        [[0.75, 0.25], [0.25, 0.75]]
    """

    def __init__(self, *, num_neighbours: int = 50, prior: float = 5.0) -> None:
        super().__init__()
        check_range(type(self).__name__, "num_neighbours", num_neighbours, 1, 100_000)
        check_range(type(self).__name__, "prior", prior, 0, 1000)
        self.num_neighbours = num_neighbours
        self.prior = prior

    def learn(self, lessons: Lessons) -> State:
        mean, _ = mean_scores(lessons.scores)
        return {"known": lessons.batch.embeddings, "scores": lessons.scores, "mean": mean}

    def score(self, batch: PromptBatch) -> Estimate:
        near, _ = neighbours(batch.embeddings, self.state["known"], self.num_neighbours)
        values, seen = filled(self.state["scores"])
        count = seen[near].sum(1) + self.prior
        total = values[near].sum(1) + self.prior * self.state["mean"]
        quality = np.where(count > 0, total / np.maximum(count, 1e-12), self.state["mean"])
        return Estimate(quality, binomial_error(quality, count))
