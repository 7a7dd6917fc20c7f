"""One call to one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import plain
from mixtura.types.asking import Verdict
from mixtura.types.models import ModelCard, Prompt

METHOD = {"paper": None, "title": "One model", "tags": ["replays"]}


@final
class Single(Aggregator):
    """Ask the preferred model, and the next one only where that fails.

    What every other way of combining models must beat for its price.

    Shapes:
        One call; as many as there are models where all fail.

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> models = (ModelCard(name="a"), ModelCard(name="b"))
        >>> verdict, asked = rehearse(Single().plan(Prompt(id="0", text="2 + 2?"), models), lambda ask: "4")
        >>> verdict.text, [ask.model for ask in asked]
        ('4', ['a'])
    """

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        for model in models:
            (reply,) = yield [plain(prompt, model.name)]
            if reply.ok:
                return Verdict(reply.text)
        return Verdict("", abstained=True)

    def most_calls(self, num_models: int) -> int:
        return num_models
