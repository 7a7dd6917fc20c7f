"""Prompts and models as vectors of a few numbers each."""

from __future__ import annotations

from typing import final

import numpy as np

from mixtura.errors import check_range
from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._shared import Adam, filled, mean_scores, sigmoid, unknown
from mixtura.types.models import Lessons, PromptBatch

METHOD = {"paper": None, "title": "Matrix factorisation"}
# Prompts that are not learned from and say when to stop, where they are enough to say it.
_HELD_SHARE, _LEAST_HELD = 0.1, 20


@final
class MatrixFactorization(ModelRouter):
    """Predict scores from the product of a prompt's and a model's vector of a few numbers.

    The prompt's vector is a linear map of its embedding, so new prompts have one. All models share the map:
    what one shows of a kind of prompt helps to place the others, which matters where a table has many holes.
    A tenth of the prompts is held back, and the step at which it was predicted best is kept.

    Shapes:
        Embeddings [P, C] times a map [C, R] times vectors [R, M], and a bias [M], to scores [P, M].

    Raises:
        SettingError: ``rank`` is outside [1, 512], ``num_steps`` outside [1, 10000], ``rate`` outside (0, 1]
            or ``decay`` outside [0, 1].

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> batch = PromptBatch(tuple(Prompt(id=str(n)) for n in range(4)), np.eye(2)[[0, 0, 1, 1]])
        >>> scores = np.array([[1.0, 0.0], [1.0, np.nan], [0.0, 1.0], [0.0, 1.0]])
        >>> router = MatrixFactorization(rank=1)
        >>> router.fit(Lessons(batch, (ModelCard(name="a"), ModelCard(name="b")), scores, scores))
        >>> (router.score(batch).quality[[0, 3]] > 0.8).tolist()
        [[True, False], [False, True]]
    """

    def __init__(
        self,
        *,
        rank: int = 16,
        num_steps: int = 200,
        rate: float = 0.02,
        decay: float = 0.0003,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_range(type(self).__name__, "rank", rank, 1, 512)
        check_range(type(self).__name__, "num_steps", num_steps, 1, 10_000)
        check_range(type(self).__name__, "rate", rate, 1e-9, 1)
        check_range(type(self).__name__, "decay", decay, 0, 1)
        self.rank = rank
        self.num_steps = num_steps
        self.rate = rate
        self.decay = decay
        self.seed = seed

    def learn(self, lessons: Lessons) -> State:
        points, (values, seen) = lessons.batch.embeddings.astype(float), filled(lessons.scores)
        generator = np.random.default_rng(self.seed)
        mean = np.clip(np.nan_to_num(mean_scores(lessons.scores)[0], nan=0.5), 0.01, 0.99)
        parts = [
            generator.normal(size=(points.shape[1], self.rank)) / self.rank,
            generator.normal(size=(self.rank, values.shape[1])) / self.rank,
            np.log(mean / (1 - mean))[None],
        ]
        held = generator.random(len(points)) < _HELD_SHARE
        if held.sum() < _LEAST_HELD:
            held[:] = False
        adams = [Adam(part) for part in parts]
        weight = (seen & ~held[:, None]) / max(int(seen[~held].sum()), 1) * values.shape[1]
        best, least = [part.copy() for part in parts], np.inf
        for step in range(1, self.num_steps + 1):
            hidden = points @ parts[0]
            logits = hidden @ parts[1] + parts[2]
            loss = _log_loss(logits[held], values[held], seen[held]) if held.any() else -float(step)
            if loss < least:
                best, least = [part.copy() for part in parts], loss
            wrong = weight * (sigmoid(logits) - values)
            slopes = [points.T @ (wrong @ parts[1].T), hidden.T @ wrong, wrong.sum(0, keepdims=True)]
            for part, slope, adam in zip(parts, slopes, adams, strict=True):
                slope += self.decay * part * (part is not parts[2])
                part -= adam.change(slope, self.rate, step)
        known = np.where(seen.any(0), 1.0, np.nan)
        return {"map": best[0], "vectors": best[1] * known, "bias": best[2] * known}

    def score(self, batch: PromptBatch) -> Estimate:
        logits = batch.embeddings @ self.state["map"] @ self.state["vectors"] + self.state["bias"]
        return Estimate(sigmoid(logits), unknown(*logits.shape))


def _log_loss(logits: np.ndarray, values: np.ndarray, seen: np.ndarray) -> float:
    return float((np.logaddexp(0, logits) - values * logits)[seen].mean()) if seen.any() else 0.0
