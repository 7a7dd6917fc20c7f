"""FusionRoute: a small model that picks an expert for every token and adds its own logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.ensembles import (
    NO_TARGET,
    Ensemble,
    Facts,
    Lesson,
    Mixed,
    Text,
    all_logits,
    chosen,
    cross_entropy,
)

METHOD = {
    "paper": 105,
    "title": "Token-Level LLM Collaboration via FusionRoute",
    "tags": ["trained", "own_model", "pairs"],
}


@final
class FusionRoute(Ensemble):
    """Let a small router model pick one expert model for each token, and correct what that one says.

    The router is a language model of the experts' vocabulary with a linear head on its last hidden state.
    The head picks an expert; its logits and the router's own are added: log pi = log pi_router + log
    pi_expert, up to normalisation. Only the expert that is picked runs.

    Training has two stages. ``tuning``: the router learns to foretell the text, and the head which expert
    does so best, from tokens of which the experts say different things. ``preference``: from pairs of answers
    the router learns what to add to experts (the head stands still) by DPO of the sum, against what the sum
    was before the stage.

    Shapes:
        Hidden states [S, T, D] to scores [S, T, M]; logits [S, T, V] of router and expert to
        log-probabilities [S, T, V].

    Raises:
        SettingError: ``beta`` or ``head_weight`` is negative or too large, or ``tunes`` is unknown.

    Cost:
        Two forward passes a token: the router and one expert; an expert that was not picked for some tokens
        reads them when it is next picked.

    Example:
        >>> import torch
        >>> from mixtura.authoring.contracts.ensembles import said
        >>> text = said(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), own=torch.zeros(2))
        >>> method = FusionRoute()
        >>> method.build(text.facts)
        >>> _ = nn.init.zeros_(method.head.weight), nn.init.constant_(method.head.bias, 0.0)
        >>> [round(one, 4) for one in method(text).log_probabilities.exp()[0, 0].tolist()]
        [0.2689, 0.7311]

    Differences from the paper:
        Known to us from summaries. The head's target is softmax_i(log pi_i(y)), a share for each expert, and
        tokens count for it where the experts' likeliest tokens differ; its loss is added with ``head_weight``
        1. ``beta`` is 0.1. The router begins as a copy of one of the models given. ``tunes="sum"``, which
        trains the sum in the first stage instead of the router alone, is an addition.

    Reference:
        Token-Level LLM Collaboration via FusionRoute (paper 105).
    """

    stages: ClassVar[tuple[str, ...]] = ("tuning", "preference")

    def __init__(
        self, *, beta: float = 0.1, head_weight: float = 1.0, tunes: Literal["router", "sum"] = "router"
    ) -> None:
        super().__init__()
        self.beta = self.within("beta", beta, 0.0, 100.0)
        self.head_weight = self.within("head_weight", head_weight, 0.0, 1e3)
        self.tunes = tunes

    def build(self, facts: Facts) -> None:
        self.head = nn.Linear(facts.widths[-1], len(facts.widths) - 1)

    def forward(self, text: Text, state: Any = None) -> Mixed:
        del state
        picked = self._scores(text).argmax(-1)
        experts = torch.zeros_like(text.logits(text.own))
        for place in picked[text.valid > 0].unique().tolist():
            own = (picked == place)[..., None]
            experts = torch.where(own, text.logits(place).log_softmax(-1), experts)
        mixed = text.logits(text.own).log_softmax(-1) + experts
        return Mixed(mixed.log_softmax(-1), F.one_hot(picked, text.num_models).to(mixed))

    def learns(self, stage: str) -> Iterable[nn.Parameter]:
        return self.head.parameters() if stage == "tuning" else ()

    def loss(self, stage: str, lessons: Sequence[Lesson]) -> Float[Tensor, ""]:
        if stage == "tuning":
            (one,) = lessons
            alone = self.tunes == "router"
            said = one.text.logits(one.text.own) if alone else self(one.text).log_probabilities
            # Of what is a log-probability already this changes nothing.
            said = said.log_softmax(-1)
            return cross_entropy(said, one.targets) + self.head_weight * self._head_loss(one)
        preferred, other = (self._gained(one) for one in lessons)
        return -F.logsigmoid(self.beta * (preferred - other)).mean()

    def _scores(self, text: Text) -> Float[Tensor, "S T M"]:
        found: Tensor = self.head(text.hidden(text.own))
        return found

    def _gained(self, lesson: Lesson) -> Float[Tensor, " S"]:
        """How much more probable answers are than when the stage began, as logarithms."""
        assert lesson.before is not None
        return chosen(self(lesson.text).log_probabilities, lesson.targets).sum(1) - lesson.before

    def _head_loss(self, lesson: Lesson) -> Float[Tensor, ""]:
        said = all_logits(lesson.text).log_softmax(-1)
        first = said.argmax(-1)
        counts = (first != first[..., :1]).any(-1) & (lesson.targets != NO_TARGET)
        scores = self._scores(lesson.text)
        if not counts.any():
            return scores.sum() * 0.0
        places = lesson.targets.clamp(min=0)[..., None, None].expand(*said.shape[:3], 1)
        target = said.gather(-1, places)[..., 0].softmax(-1)
        return F.cross_entropy(scores[counts], target[counts])
