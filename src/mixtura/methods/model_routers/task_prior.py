"""The best model of each task."""

from __future__ import annotations

from typing import final

import numpy as np

from mixtura.errors import check_range
from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._shared import (
    bytes_as_words,
    check_word,
    group_means,
    labels_of,
    mean_scores,
    numbered,
    words_as_bytes,
)
from mixtura.types.models import Lessons, PromptBatch

METHOD = {"paper": None, "title": "Mean score by task", "tags": ["dynamic_pool", "reads:labels"]}


@final
class TaskPrior(ModelRouter):
    """Send a prompt to the model with the best mean score on its task, read from a label.

    It reads no text. A router that reads text and does not beat it has learned to tell tasks apart and no
    more. A task that was never seen gets the models' means over all.

    Shapes:
        Scores [P, M] and P labels to means [tasks, M].

    Raises:
        SettingError: ``prior`` is outside [0, 1000], or ``label`` has spaces.

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> prompts = tuple(Prompt(id=str(n), labels={"task": "xy"[n // 2]}) for n in range(4))
        >>> batch = PromptBatch(prompts, np.ones((4, 1)))
        >>> scores = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> cards = (ModelCard(name="a"), ModelCard(name="b"))
        >>> router = TaskPrior(prior=2.0)
        >>> router.fit(Lessons(batch, cards, scores, scores))
        >>> [[float(one) for one in row] for row in router.score(batch).quality[[0, 3]]]
        [[0.75, 0.25], [0.25, 0.75]]
    """

    def __init__(self, *, label: str = "task", prior: float = 5.0) -> None:
        super().__init__()
        check_word(type(self).__name__, "label", label)
        check_range(type(self).__name__, "prior", prior, 0, 1000)
        self.label = label
        self.prior = prior

    def learn(self, lessons: Lessons) -> State:
        words = labels_of(lessons.batch, self.label)
        tasks = sorted(set(words))
        mean, error = self._means(lessons, tasks)
        return {"mean": mean, "error": error, "tasks": words_as_bytes(tasks)}

    def _means(self, lessons: Lessons, tasks: list[str]) -> tuple[np.ndarray, np.ndarray]:
        places = numbered(labels_of(lessons.batch, self.label), tasks)
        mean, error = group_means(lessons.scores, places, len(tasks) + 1, self.prior)
        # The last row is for tasks that were never seen.
        mean[-1], error[-1] = mean_scores(lessons.scores)
        return mean, error

    def score(self, batch: PromptBatch) -> Estimate:
        rows = numbered(labels_of(batch, self.label), bytes_as_words(self.state["tasks"]))
        return Estimate(self.state["mean"][rows], self.state["error"][rows])

    def admit(self, lessons: Lessons) -> None:
        mean, error = self._means(lessons, bytes_as_words(self.state["tasks"]))
        self.state = {
            **self.state,
            "mean": np.concatenate([self.state["mean"], mean], axis=1),
            "error": np.concatenate([self.state["error"], error], axis=1),
        }
        self.models += tuple(card.name for card in lessons.cards)
