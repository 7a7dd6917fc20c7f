"""A graph of prompts, the things that they name, and models: who is good where these are named."""

from __future__ import annotations

from typing import final

import numpy as np
from jaxtyping import Float

from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._naming import edges_of, entities_of, named_most
from mixtura.methods.model_routers._shared import (
    Adam,
    bytes_as_words,
    filled,
    mean_scores,
    softmax,
    unknown,
    with_ones,
    words_as_bytes,
)
from mixtura.types.models import Lessons, PromptBatch

METHOD = {
    "paper": 133,
    "title": "AgentRouter: A Knowledge-Graph-Guided LLM Router for Collaborative Multi-Agent Question "
    "Answering",
}


@final
class EntityGraph(ModelRouter):
    """Knowledge graph router: let what is known of names, numbers and times in a prompt say which model fits.

    Prompts, the entities that they mention, and models are nodes. In a first round an entity is given the
    mean of its prompts' embeddings and of each model's scores on them; in a second a prompt is given the mean
    of its entities. A softmax over models of both, and of the prompt's own embedding, is trained towards
    ``softmax(score / temperature)`` by KL divergence. What a prompt itself told its entities is taken back
    while it is trained on, or it would learn from its own outcome.

    Shapes:
        Embeddings [P, C], means of entities [P, C] and [P, M], weights [2 C + 1, M] to shares [P, M].

    Raises:
        SettingError: ``temperature``, ``prior``, ``most_entities``, ``num_steps``, ``rate`` or ``decay`` is
            out of range.

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> texts = [f"go to {place} {n}x" for n in range(3) for place in ("Rome", "Oslo")]
        >>> batch = PromptBatch(tuple(Prompt(id=x, text=x) for x in texts), np.ones((6, 1)))
        >>> scores = np.array([[1.0, 0.0], [0.0, 1.0]] * 3)
        >>> router = EntityGraph()
        >>> cards = (ModelCard(name="a"), ModelCard(name="b"))
        >>> router.fit(Lessons(batch, cards, scores, scores))
        >>> new = PromptBatch((Prompt(id="x", text="see Oslo"),), np.ones((1, 1)))
        >>> [one.model for one in router.decide(new, cards, np.ones((1, 2)))]
        ['b']

    Differences from the paper:
        Entities are found by their form, there by a language model, and have no types and no relations among
        themselves; two rounds of means with one trained linear map, in place of a trained heterogeneous
        graph network; a model's way of prompting is a card of its own. A node of a model is its scores,
        shrunk to its mean as by ``prior`` more outcomes. One model answers, the one of the greatest share;
        for the paper's weighted vote ask several. Shares are returned as quality, which ranks, and is no
        expected score until it is calibrated. Only the paper's abstract and a summary of its formulas were
        at hand.

    Reference:
        AgentRouter: A Knowledge-Graph-Guided LLM Router for Collaborative Multi-Agent Question Answering
        (paper 133).
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        prior: float = 2.0,
        most_entities: int = 2000,
        num_steps: int = 200,
        rate: float = 0.05,
        decay: float = 0.001,
    ) -> None:
        super().__init__()
        self.temperature = self.within("temperature", temperature, 1e-3, 100)
        self.prior = self.within("prior", prior, 1e-6, 1000)
        self.most_entities = self.within("most_entities", most_entities, 0, 100_000)
        self.num_steps = self.within("num_steps", num_steps, 1, 10_000)
        self.rate = self.within("rate", rate, 1e-9, 10)
        self.decay = self.within("decay", decay, 0, 1)

    def learn(self, lessons: Lessons) -> State:
        named = [entities_of(prompt.text) for prompt in lessons.batch.prompts]
        entities = named_most(named, self.most_entities)
        edges = edges_of(named, entities)
        embeddings, (values, seen) = lessons.batch.embeddings, filled(lessons.scores)
        mean = np.nan_to_num(mean_scores(lessons.scores)[0])
        sums = {"places": edges.T @ embeddings, "wins": edges.T @ values, "tries": edges.T @ seen}
        sums["sizes"] = edges.sum(0)
        own = (embeddings, np.where(seen, values, 0.0), seen.astype(float))
        points, skills = self._told(embeddings, edges, sums, mean, own)
        target = softmax(np.where(seen, lessons.scores, -np.inf) / self.temperature)
        weights, trust = np.zeros((points.shape[1], len(mean))), np.ones(1)
        adams = Adam(weights), Adam(trust)
        for step in range(1, self.num_steps + 1):
            shares = softmax(np.where(seen, points @ weights + trust * skills, -np.inf))
            ahead = (shares - target) / len(points)
            slopes = points.T @ ahead + self.decay * weights, np.array([(ahead * skills).sum()])
            weights = weights - adams[0].change(slopes[0], self.rate, step)
            trust = trust - adams[1].change(slopes[1], self.rate, step)
        known = seen.any(0).astype(float)
        names = words_as_bytes(entities)
        return {"weights": weights, "trust": trust, "mean": mean, "known": known, "names": names, **sums}

    def score(self, batch: PromptBatch) -> Estimate:
        state = self.state
        edges = edges_of(
            [entities_of(prompt.text) for prompt in batch.prompts], bytes_as_words(state["names"])
        )
        points, skills = self._told(batch.embeddings, edges, state, state["mean"])
        logits = points @ state["weights"] + state["trust"] * skills
        shares = softmax(logits)
        return Estimate(np.where(state["known"] > 0, shares, np.nan), unknown(*shares.shape))

    def _told(
        self,
        embeddings: Float[np.ndarray, "P C"],
        edges: Float[np.ndarray, "P E"],
        sums: State,
        mean: Float[np.ndarray, " M"],
        own: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    ) -> tuple[Float[np.ndarray, "P N"], Float[np.ndarray, "P M"]]:
        """What prompts are told by their entities; without what these know from the prompts themselves."""
        num = np.maximum(edges.sum(1, keepdims=True), 1)
        shares = edges / np.maximum(sums["sizes"] - (own is not None), 1)
        around = shares @ sums["places"]
        before = sums["wins"] + self.prior * mean
        skills = edges @ (before / (sums["tries"] + self.prior))
        if own is not None:
            around = around - shares.sum(1, keepdims=True) * own[0]
            less = np.maximum(sums["tries"] - 1, 0) + self.prior
            skills = np.where(own[2] > 0, edges @ (before / less) - own[1] * (edges @ (1 / less)), skills)
        skills = np.where(edges.any(1, keepdims=True), skills / num - mean, 0.0)
        return with_ones(np.concatenate([embeddings, around / num], axis=1)), skills
