"""An expert is where its best prompts lie."""

from __future__ import annotations

from typing import final

import numpy as np

from mixtura.methods.model_routers import Estimate, ModelRouter, State
from mixtura.methods.model_routers._shared import (
    bytes_as_words,
    check_word,
    labels_of,
    mean_scores,
    numbered,
    unknown,
    words_as_bytes,
)
from mixtura.types.models import Lessons, PromptBatch

METHOD = {
    "paper": 45,
    "title": "RouterRetriever: Exploring the Benefits of Routing over Multiple Expert Embedding Models",
    "tags": ["dynamic_pool"],
}


@final
class RouterRetriever(ModelRouter):
    """Choose the expert whose pilot embeddings are most similar to the prompt, on average.

    Every known prompt belongs to the expert that did best on it. Of each expert's prompts of one task the
    mean embedding is kept as a pilot. An expert's score is the mean cosine between the prompt and its pilots.
    Nothing is trained; experts come and go with their pilots.

    Shapes:
        Embeddings [P, C] against pilots [N, C], each of one expert, to scores [P, M].

    Raises:
        SettingError: ``label`` has spaces.

    Example:
        >>> from mixtura.types.models import Lessons, ModelCard, Prompt, PromptBatch
        >>> batch = PromptBatch(tuple(Prompt(id=str(n)) for n in range(4)), np.eye(2)[[0, 0, 1, 1]])
        >>> scores = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> router = RouterRetriever()
        >>> router.fit(Lessons(batch, (ModelCard(name="a"), ModelCard(name="b")), scores, scores))
        >>> router.score(batch).quality[[0, 3]].tolist()
        [[1.0, 0.5], [0.5, 1.0]]

    Differences from the paper:
        The experts here are any models, in the paper embedding models that search; the score that says which
        did best is the table's. The mean cosine is moved to [0, 1] as (1 + cosine) / 2, which ranks the same;
        it is no probability until it is calibrated. Of models that did equally well the one of the better
        mean gets the prompt. A model that is admitted later gets pilots of the prompts on which it reached a
        score of 0.5, as the old ones keep theirs. A model that was best nowhere has no score.

    Reference:
        RouterRetriever: Exploring the Benefits of Routing over Multiple Expert Embedding Models (paper 45).
    """

    def __init__(self, *, label: str = "task") -> None:
        super().__init__()
        check_word(type(self).__name__, "label", label)
        self.label = label

    def learn(self, lessons: Lessons) -> State:
        means = np.nan_to_num(mean_scores(lessons.scores)[0])
        raised = np.where(np.isnan(lessons.scores), -1.0, lessons.scores) + 1e-9 * means
        return self._pilots(lessons, raised.argmax(1))

    def _pilots(self, lessons: Lessons, owners: np.ndarray) -> State:
        words = labels_of(lessons.batch, self.label)
        tasks = numbered(words, sorted(set(words)))
        pilots, belongs = [], []
        for expert, task in sorted({(int(o), int(t)) for o, t in zip(owners, tasks, strict=True) if o >= 0}):
            mean = lessons.batch.embeddings[(owners == expert) & (tasks == task)].mean(0)
            pilots.append(mean / max(float(np.linalg.norm(mean)), 1e-12))
            belongs.append(lessons.cards[expert].name)
        width = lessons.batch.embeddings.shape[1]
        return {"pilots": np.array(pilots).reshape(-1, width), "owners": words_as_bytes(belongs)}

    def score(self, batch: PromptBatch) -> Estimate:
        products = batch.embeddings @ self.state["pilots"].T
        owners = numbered(bytes_as_words(self.state["owners"]), self.models)
        quality = unknown(len(batch), len(self.models))
        for place in range(len(self.models)):
            if (owners == place).any():
                quality[:, place] = np.clip((1 + products[:, owners == place].mean(1)) / 2, 0, 1)
        return Estimate(quality, unknown(*quality.shape))

    def admit(self, lessons: Lessons) -> None:
        old = bytes_as_words(self.state["owners"])
        pilots = [self.state["pilots"]]
        for place in range(len(lessons.cards)):
            made = self._pilots(lessons, np.where(lessons.scores[:, place] >= 0.5, place, -1))
            pilots.append(made["pilots"])
            old += bytes_as_words(made["owners"])
        self.state = {"pilots": np.concatenate(pilots), "owners": words_as_bytes(old)}
        self.models += tuple(card.name for card in lessons.cards)
