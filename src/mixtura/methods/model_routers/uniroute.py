"""A model is the errors it makes in each cluster of prompts."""

from __future__ import annotations

from typing import final

import numpy as np

from mixtura.errors import check_range
from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._shared import clusters, group_means, nearest_centre
from mixtura.types.models import Lessons, PromptBatch

METHOD = {
    "paper": 131,
    "title": "Universal Model Routing for Efficient LLM Inference",
    "tags": ["dynamic_pool"],
}


@final
class Uniroute(ModelRouter):
    """Describe every model by its mean score in each cluster of prompts, and a prompt by its cluster.

    Prompts are clustered once (k-means of their embeddings), without looking at outcomes. A model that comes
    later is asked a small set of prompts and gets a vector of its own; nothing else is learned anew.

    Shapes:
        Embeddings [P, C] to P clusters of ``num_clusters``; scores [P, M] to [clusters, M].

    Raises:
        SettingError: ``num_clusters`` is outside [1, 10000], or ``prior`` outside [0, 1000].

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> batch = PromptBatch(tuple(Prompt(id=str(n)) for n in range(4)), np.eye(2)[[0, 0, 1, 1]])
        >>> scores = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> router = Uniroute(num_clusters=2, prior=2.0)
        >>> router.fit(Lessons(batch, (ModelCard(name="a"), ModelCard(name="b")), scores, scores))
        >>> [[float(one) for one in row] for row in router.score(batch).quality[[0, 3]]]
        [[0.75, 0.25], [0.25, 0.75]]

    Differences from the paper:
        Clusters are of directions (cosine), of whatever embedding mixtura is given. Each cluster's mean is
        drawn to the model's own over all, as by ``prior`` more outcomes, which matters where few labels are
        known; the paper takes the plain mean. Clusters come from the prompts with outcomes, the paper's from
        a larger set without. The second method of the paper, with a learned map to clusters, is left out.
        The defaults of 20 clusters and a prior of 5 are mixtura's.

    Reference:
        Universal Model Routing for Efficient LLM Inference (paper 131).
    """

    def __init__(self, *, num_clusters: int = 20, prior: float = 5.0, seed: int = 0) -> None:
        super().__init__()
        check_range(type(self).__name__, "num_clusters", num_clusters, 1, 10_000)
        check_range(type(self).__name__, "prior", prior, 0, 1000)
        self.num_clusters = num_clusters
        self.prior = prior
        self.seed = seed

    def learn(self, lessons: Lessons) -> State:
        centres = clusters(lessons.batch.embeddings, self.num_clusters, self.seed)
        mean, error = self._means(lessons, centres)
        return {"centres": centres, "mean": mean, "error": error}

    def _means(self, lessons: Lessons, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        near = nearest_centre(lessons.batch.embeddings, centres)
        return group_means(lessons.scores, near, len(centres), self.prior)

    def score(self, batch: PromptBatch) -> Estimate:
        near = nearest_centre(batch.embeddings, self.state["centres"])
        return Estimate(self.state["mean"][near], self.state["error"][near])

    def admit(self, lessons: Lessons) -> None:
        mean, error = self._means(lessons, self.state["centres"])
        self.state = {
            **self.state,
            "mean": np.concatenate([self.state["mean"], mean], axis=1),
            "error": np.concatenate([self.state["error"], error], axis=1),
        }
        self.models += tuple(card.name for card in lessons.cards)
