"""Categories of prompts, and the expert of each, chosen together within memory."""

from __future__ import annotations

from itertools import combinations
from typing import final

import numpy as np

from mixtura.errors import UserError, check_range
from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._shared import (
    check_word,
    greedy_set,
    group_means,
    labels_of,
    neighbours,
    numbered,
)
from mixtura.types.models import Lessons, PromptBatch

METHOD = {
    "paper": 96,
    "title": "Composition of Experts: A Modular Compound AI System Leveraging Large Language Models",
}
# Beyond so many models sets are not all tried.
_EXACT = 16


@final
class CategoryMap(ModelRouter):
    """Classify a prompt into a category; each category has an expert, and all experts fit a budget of bytes.

    The category is the majority label of the nearest known prompts. The map from category to expert is the
    one of greatest expected score, with every chosen model held in memory at once: for up to 16 models the
    best of all sets that fit, beyond that a greedy choice improved by swaps. Without a budget every category
    gets its best model (the design of MoDEM, paper 125).

    Shapes:
        Embeddings [P, C] to categories [P]; mean scores [categories, M].

    Raises:
        SettingError: ``num_bytes`` or ``num_neighbours`` is out of range, ``least_share`` outside
            [0, 1], or ``label`` has spaces.
        UserError: there is a budget and a model's size is not known, or none fits.

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> prompts = tuple(Prompt(id=str(n), labels={"task": "xy"[n // 2]}) for n in range(4))
        >>> batch = PromptBatch(prompts, np.eye(2)[[0, 0, 1, 1]])
        >>> scores = np.array([[1.0, 0.0, 0.6], [1.0, 0.0, 0.6], [0.0, 1.0, 0.6], [0.0, 1.0, 0.6]])
        >>> cards = tuple(ModelCard(name=name, num_bytes=10) for name in "abc")
        >>> for num_bytes in (None, 10):
        ...     router = CategoryMap(num_bytes=num_bytes, num_neighbours=1)
        ...     router.fit(Lessons(batch, cards, scores, scores))
        ...     print([one.model for one in router.decide(batch, cards, np.zeros((4, 3)))])
        ['a', 'a', 'b', 'b']
        ['c', 'c', 'c', 'c']

    Differences from the paper:
        Only its abstract and posts of its makers were read. Categories are the label of the table; the
        classifier is nearest neighbours (20) on mixtura's embedding. Where less than ``least_share`` of the
        neighbours agree, the model of the best mean in the set answers, as their later versions send what is
        unsure to a strong base; the default, 0, never does. Means of a category are drawn to the model's own,
        as by 5 more outcomes.

    Reference:
        Composition of Experts: A Modular Compound AI System Leveraging Large Language Models (paper 96);
        MoDEM: Mixture of Domain Expert Models (paper 125).
    """

    def __init__(
        self,
        *,
        label: str = "task",
        num_bytes: int | None = None,
        num_neighbours: int = 20,
        least_share: float = 0.0,
    ) -> None:
        super().__init__()
        check_word(type(self).__name__, "label", label)
        check_range(type(self).__name__, "num_bytes", 1 if num_bytes is None else num_bytes, 1, 2**63)
        check_range(type(self).__name__, "num_neighbours", num_neighbours, 1, 100_000)
        check_range(type(self).__name__, "least_share", least_share, 0, 1)
        self.label = label
        self.num_bytes = num_bytes
        self.num_neighbours = num_neighbours
        self.least_share = least_share

    def learn(self, lessons: Lessons) -> State:
        words = labels_of(lessons.batch, self.label)
        places = numbered(words, sorted(set(words)))
        mean, error = group_means(lessons.scores, places, int(places.max()) + 1, prior=5.0)
        gain = np.bincount(places)[:, None] * np.nan_to_num(mean)
        chosen = self._chosen(gain, [card.num_bytes for card in lessons.cards])
        # One more row: where the neighbours do not agree.
        mean = np.concatenate([mean, (gain.sum(0) / len(places))[None]])
        error = np.concatenate([error, error.mean(0, keepdims=True)])
        mean[:, [n for n in range(mean.shape[1]) if n not in chosen]] = np.nan
        return {"known": lessons.batch.embeddings, "places": places, "mean": mean, "error": error}

    def _chosen(self, gain: np.ndarray, sizes: list[int | None]) -> tuple[int, ...]:
        """The models to hold: of the greatest sum of each category's best, within the budget."""
        every = tuple(range(gain.shape[1]))
        if self.num_bytes is None:
            return every
        if None in sizes:
            raise UserError("num_bytes of category_map needs num_bytes on the card of every model")
        held = [size or 0 for size in sizes]
        fits = [n for n in every if held[n] <= self.num_bytes]
        if not fits:
            raise UserError(f"num_bytes of category_map is {self.num_bytes}; the smallest model {min(held)}")
        if len(fits) <= _EXACT:
            sets = (set_ for k in range(1, len(fits) + 1) for set_ in combinations(fits, k))
            good = [s for s in sets if sum(held[n] for n in s) <= self.num_bytes]
            return max(good, key=lambda s: (gain[:, list(s)].max(1).sum(), -len(s)))
        return greedy_set(gain, held, fits, self.num_bytes)

    def score(self, batch: PromptBatch) -> Estimate:
        near, _ = neighbours(batch.embeddings, self.state["known"], self.num_neighbours)
        votes = np.zeros((len(batch), len(self.state["mean"]) - 1))
        for column in near.T:
            votes[np.arange(len(batch)), self.state["places"][column]] += 1 / near.shape[1]
        rows = np.where(votes.max(1) >= self.least_share, votes.argmax(1), votes.shape[1])
        return Estimate(self.state["mean"][rows], self.state["error"][rows])
