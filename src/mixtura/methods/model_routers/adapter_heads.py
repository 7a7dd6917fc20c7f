"""The base model, unless a task's expert claims the prompt."""

from __future__ import annotations

from typing import final

import numpy as np

from mixtura.errors import SettingError, check_range, suggest
from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._heads import fit_heads
from mixtura.methods.model_routers._shared import (
    bytes_as_words,
    check_word,
    mean_scores,
    sigmoid,
    unknown,
    with_ones,
    words_as_bytes,
)
from mixtura.types.models import Lessons, PromptBatch

METHOD = {
    "paper": 72,
    "title": "Dynamic Routing Between Experts: A Data-Efficient Approach to Continual Learning in "
    "Vision-Language Models",
    "tags": ["dynamic_pool"],
}


@final
class AdapterHeads(ModelRouter):
    """Keep to the base model unless one of several experts claims the prompt as its own.

    Made for a base model with one adapter a task: a light head on embeddings for each expert says how
    probable it is that the expert does better than the base. If no head is surer than ``threshold`` the base
    answers. Heads are fitted apart, so a new expert leaves old ones as they were, and needs no data of
    theirs.

    Shapes:
        Embeddings [P, C] and heads [C + 1, M] to probabilities [P, M].

    Raises:
        SettingError: ``threshold`` is outside [0, 1], ``decay`` outside [1e-6, 100], or ``base`` is no model
            of the table.

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> batch = PromptBatch(tuple(Prompt(id=str(n)) for n in range(4)), np.eye(2)[[0, 0, 1, 1]])
        >>> scores = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> cards = (ModelCard(name="base"), ModelCard(name="expert"))
        >>> router = AdapterHeads(base="base", decay=0.01)
        >>> router.fit(Lessons(batch, cards, scores, scores))
        >>> [one.model for one in router.decide(batch, cards, np.zeros((4, 2)))]
        ['base', 'base', 'expert', 'expert']

    Differences from the paper:
        Experts are any models with a base; only the abstract was read, which says that a light router on
        embeddings sends an input to the base or to an expert. Here the router is one logistic head an expert
        whose label is "did better than the base"; where both were equally good that is no. Without ``base``
        the model of the best mean score is the base. What is returned as quality is 0.5 for the base and
        0.5 more or less the head's distance from the threshold for experts: it ranks, and is no probability
        until it is calibrated.

    Reference:
        Dynamic Routing Between Experts: A Data-Efficient Approach to Continual Learning in Vision-Language
        Models (paper 72).
    """

    def __init__(self, *, base: str = "", threshold: float = 0.5, decay: float = 0.001) -> None:
        super().__init__()
        if base:
            check_word(type(self).__name__, "base", base)
        check_range(type(self).__name__, "threshold", threshold, 0, 1)
        check_range(type(self).__name__, "decay", decay, 1e-6, 100)
        self.base = base
        self.threshold = threshold
        self.decay = decay

    def learn(self, lessons: Lessons) -> State:
        names = [card.name for card in lessons.cards]
        if self.base and self.base not in names:
            raise SettingError(f"base of AdapterHeads is no model of the table; {suggest(self.base, names)}")
        mean, _ = mean_scores(lessons.scores)
        place = names.index(self.base) if self.base else int(np.nan_to_num(mean, nan=-1.0).argmax())
        base = lessons.scores[:, place]
        state = self._heads(lessons, base)
        ids = words_as_bytes([prompt.id for prompt in lessons.batch.prompts])
        return {**state, "base": np.array([place]), "base_scores": base, "ids": ids}

    def _heads(self, lessons: Lessons, base: np.ndarray) -> dict[str, np.ndarray]:
        missing = np.isnan(lessons.scores) | np.isnan(base)[:, None]
        better = np.where(missing, np.nan, (lessons.scores > base[:, None]).astype(float))
        return {"heads": fit_heads(with_ones(lessons.batch.embeddings), better, self.decay)[0]}

    def score(self, batch: PromptBatch) -> Estimate:
        claims = sigmoid(with_ones(batch.embeddings) @ self.state["heads"])
        quality = np.clip(0.5 + (claims - self.threshold) / 2, 0, 1)
        quality[:, int(self.state["base"][0])] = 0.5
        return Estimate(quality, unknown(*quality.shape))

    def admit(self, lessons: Lessons) -> None:
        known = dict(zip(bytes_as_words(self.state["ids"]), self.state["base_scores"], strict=True))
        base = np.array([known.get(prompt.id, np.nan) for prompt in lessons.batch.prompts])
        heads = self._heads(lessons, base)["heads"]
        self.state = {**self.state, "heads": np.concatenate([self.state["heads"], heads], axis=1)}
        self.models += tuple(card.name for card in lessons.cards)
