"""The answer that most models give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import good, plain, plurality
from mixtura.types.models import ModelCard, Prompt

METHOD = {"paper": None, "title": "Plurality of models", "tags": ["replays", "votes"]}


@final
class Vote(Aggregator):
    """Ask every model once and take the answer that most of them give.

    Answers are compared by what a text says its answer is (the last boxed one, or what follows "the answer
    is"), else by the whole text. Of equally many votes the first model's counts.

    Shapes:
        M calls at once.

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> models = tuple(ModelCard(name=name) for name in "abc")
        >>> says = {"a": "Paris", "b": "The answer is Rome.", "c": "Answer: rome"}
        >>> rehearse(Vote().plan(Prompt(id="0", text="?"), models), lambda ask: says[ask.model])[0].text
        'The answer is Rome.'
    """

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        replies = yield [plain(prompt, model.name) for model in models]
        return plurality(good(replies))

    def most_calls(self, num_models: int) -> int:
        return num_models
