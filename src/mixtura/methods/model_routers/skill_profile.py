"""Models by the skills that a prompt asks for."""

from __future__ import annotations

from typing import final

import numpy as np

from mixtura.errors import check_range
from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._shared import (
    bytes_as_words,
    check_word,
    filled,
    mean_scores,
    neighbours,
    numbered,
    unknown,
    words_as_bytes,
)
from mixtura.types.models import Lessons, Prompt, PromptBatch

METHOD = {
    "paper": 172,
    "title": "Symbolic Mixture-of-Experts: Adaptive Skill-based Routing for Heterogeneous Reasoning",
    "tags": ["reads:labels", "soft"],
}


@final
class SkillProfile(ModelRouter):
    """Draw models by how often they were right on prompts that need the same skills.

    A model's profile counts, for every skill, right answers less wrong ones. A prompt's suitability for a
    model is the sum over its skills; it is multiplied by the model's strength over all skills and made a
    probability. Drawing several models from it, with replacement, gives the experts whose answers an
    aggregator then joins.

    Skills stand in a label, with commas between. A prompt without any has those of the most similar known
    prompt.

    Shapes:
        Skills of P prompts and a profile [skills, M] to probabilities [P, M].

    Raises:
        SettingError: ``power`` is outside [0, 16], or ``label`` has spaces.

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> prompts = tuple(Prompt(id=str(n), labels={"skills": "ab"[n // 2]}) for n in range(4))
        >>> batch = PromptBatch(prompts, np.eye(2)[[0, 0, 1, 1]])
        >>> scores = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        >>> router = SkillProfile()
        >>> router.fit(Lessons(batch, (ModelCard(name="x"), ModelCard(name="y")), scores, scores))
        >>> router.score(batch).weights[[0, 3]].tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Differences from the paper:
        Skills come from a label (a model named them in the paper, five times, and what it named twice was
        kept), and an unknown prompt takes those of one nearest prompt rather than of each nearest skill.
        Strength is the sum of a profile, shifted so that the least is 1 where any is below 1, squared as in
        the published code (``power``). Where no model has a positive score all are shifted to be positive, as
        there. The code's step that drops models below 5 % is never called there and is not here. Batching by
        model is the runner's business.

    Reference:
        Symbolic Mixture-of-Experts: Adaptive Skill-based Routing for Heterogeneous Reasoning (paper 172);
        code dinobby/Symbolic-MoE.
    """

    def __init__(self, *, label: str = "skills", power: float = 2.0) -> None:
        super().__init__()
        check_word(type(self).__name__, "label", label)
        check_range(type(self).__name__, "power", power, 0, 16)
        self.label = label
        self.power = power

    def _skills(self, prompt: Prompt) -> list[str]:
        return sorted({word.strip() for word in prompt.labels.get(self.label, "").split(",")} - {""})

    def learn(self, lessons: Lessons) -> State:
        lists = [self._skills(prompt) for prompt in lessons.batch.prompts]
        skills = sorted({skill for some in lists for skill in some})
        needs = _marks(lists, skills)
        values, seen = filled(lessons.scores)
        mean, _ = mean_scores(lessons.scores)
        # Right is +1, wrong is -1, and what was not asked is nothing.
        return {
            "profile": needs.T @ np.where(seen, 2 * values - 1, 0.0),
            "needs": needs,
            "known": lessons.batch.embeddings,
            "skills": words_as_bytes(skills),
            "mean": mean,
        }

    def score(self, batch: PromptBatch) -> Estimate:
        lists = [self._skills(prompt) for prompt in batch.prompts]
        needs = _marks(lists, bytes_as_words(self.state["skills"]))
        near, _ = neighbours(batch.embeddings, self.state["known"], 1)
        needs = np.where(needs.any(1, keepdims=True), needs, self.state["needs"][near[:, 0]])
        profile = self.state["profile"]
        strength = profile.sum(0)
        if len(strength) and strength.min() < 1:
            strength = strength - strength.min() + 1
        strength = strength**self.power / (strength**self.power).sum()
        fit = needs @ profile
        nobody = (fit <= 0).all(1, keepdims=True)
        fit = np.where(nobody, fit - fit.min(1, keepdims=True) + 1, np.maximum(fit, 0))
        weights = fit * strength
        weights /= weights.sum(1, keepdims=True)
        quality = np.broadcast_to(self.state["mean"], weights.shape).copy()
        return Estimate(quality, unknown(*weights.shape), weights)


def _marks(lists: list[list[str]], skills: list[str]) -> np.ndarray:
    """1 where a prompt needs a skill; skills that are not known leave no mark."""
    marks = np.zeros((len(lists), len(skills) + 1))
    for row, some in enumerate(lists):
        marks[row, numbered(some, skills)] = 1
    return marks[:, :-1]
