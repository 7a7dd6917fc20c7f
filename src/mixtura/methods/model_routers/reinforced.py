"""A policy learned by the reward of being right less the price of it."""

from __future__ import annotations

from typing import final

import numpy as np

from mixtura.errors import check_range
from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._shared import Adam, filled, softmax, unknown, with_ones
from mixtura.types.models import PICO_PER_DOLLAR, Lessons, PromptBatch

METHOD = {
    "paper": 115,
    "title": "xRouter: Training Cost-Aware LLMs Orchestration System via Reinforcement Learning",
}


@final
class Reinforced(ModelRouter):
    """Learn a policy over models whose reward is success less cost, nothing for a wrong answer.

    The reward of an answer is ``score * (gain - min(per_dollar * dollars, most_penalty))``. As a table has
    the outcome of every model, the expected reward of the policy, a softmax of a linear map of the prompt's
    embedding, and its gradient are computed exactly instead of by sampling.

    Shapes:
        Embeddings [P, C] and weights [C + 1, M] to probabilities [P, M].

    Raises:
        SettingError: ``gain``, ``per_dollar``, ``most_penalty``, ``rate``, ``decay`` or ``num_steps`` is out
            of range.

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> batch = PromptBatch(tuple(Prompt(id=str(n)) for n in range(4)), np.eye(2)[[0, 0, 1, 1]])
        >>> scores = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
        >>> costs = np.array([[1e9, 1e11]] * 4)
        >>> cards = (ModelCard(name="cheap"), ModelCard(name="dear"))
        >>> router = Reinforced()
        >>> router.fit(Lessons(batch, cards, scores, costs))
        >>> [one.model for one in router.decide(batch, cards, costs)]
        ['cheap', 'cheap', 'dear', 'dear']

    Differences from the paper:
        A small policy on embeddings in place of a language model that calls tools; one choice a prompt; no
        own answers, no choice of prompts and temperatures. The reward is that of the published code, where it
        is in plain dollars, so that the penalty is at its most from ``most_penalty / per_dollar`` dollars on
        ($0.27 by the defaults, which are the code's): raise ``per_dollar`` for cheap models. Of the policy
        the most probable model is chosen; its probabilities are returned as quality, which ranks, and is no
        expected score until it is calibrated. Models without an outcome for a prompt have no reward there.

    Reference:
        xRouter: Training Cost-Aware LLMs Orchestration System via Reinforcement Learning (paper 115); code
        SalesforceAIResearch/xRouter.
    """

    def __init__(
        self,
        *,
        gain: float = 1.0,
        per_dollar: float = 3.0,
        most_penalty: float = 0.8,
        num_steps: int = 200,
        rate: float = 0.1,
        decay: float = 0.0001,
    ) -> None:
        super().__init__()
        check_range(type(self).__name__, "gain", gain, 0, 1000)
        check_range(type(self).__name__, "per_dollar", per_dollar, 0, 1e9)
        check_range(type(self).__name__, "most_penalty", most_penalty, 0, 1000)
        check_range(type(self).__name__, "num_steps", num_steps, 1, 10_000)
        check_range(type(self).__name__, "rate", rate, 1e-9, 10)
        check_range(type(self).__name__, "decay", decay, 0, 1)
        self.gain = gain
        self.per_dollar = per_dollar
        self.most_penalty = most_penalty
        self.num_steps = num_steps
        self.rate = rate
        self.decay = decay

    def rewards(self, lessons: Lessons) -> np.ndarray:
        """The reward of every answer; what it cost is nothing where that is not known."""
        dollars = np.nan_to_num(lessons.costs) / PICO_PER_DOLLAR
        penalty = np.minimum(self.per_dollar * dollars, self.most_penalty)
        rewards: np.ndarray = filled(lessons.scores)[0] * (self.gain - penalty)
        return rewards

    def learn(self, lessons: Lessons) -> State:
        points, rewards = with_ones(lessons.batch.embeddings), self.rewards(lessons)
        weights = np.zeros((points.shape[1], rewards.shape[1]))
        adam = Adam(weights)
        for step in range(1, self.num_steps + 1):
            shares = softmax(points @ weights)
            # What REINFORCE with the policy's own value as its baseline has for a mean.
            ahead = shares * (rewards - (shares * rewards).sum(1, keepdims=True))
            slope = self.decay * weights - points.T @ ahead / len(points)
            weights = weights - adam.change(slope, self.rate, step)
        return {"weights": weights}

    def score(self, batch: PromptBatch) -> Estimate:
        shares = softmax(with_ones(batch.embeddings) @ self.state["weights"])
        return Estimate(shares, unknown(*shares.shape))
