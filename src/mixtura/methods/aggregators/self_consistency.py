"""The answer that one model gives most often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import good, plain, plurality
from mixtura.types.models import ModelCard, Prompt

METHOD = {"paper": None, "title": "Self-consistency", "tags": ["replays", "votes", "samples"]}


@final
class SelfConsistency(Aggregator):
    """Draw several answers of the preferred model and take the one that it gives most often.

    The strongest model several times is the baseline of every way to combine different models.

    Shapes:
        ``num_samples`` calls at once.

    Raises:
        SettingError: ``num_samples`` is outside [1, 1000] or ``temperature`` outside [0, 2].

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> method = SelfConsistency(num_samples=3)
        >>> plan = method.plan(Prompt(id="0", text="?"), (ModelCard(name="a"),))
        >>> rehearse(plan, lambda ask: "yes" if ask.sample else "no")[0].text
        'yes'
    """

    def __init__(self, *, num_samples: int = 5, temperature: float = 0.7) -> None:
        check_range(type(self).__name__, "num_samples", num_samples, 1, 1000)
        check_range(type(self).__name__, "temperature", temperature, 0, 2)
        self.num_samples = num_samples
        self.temperature = temperature

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        name = models[0].name
        replies = yield [
            plain(prompt, name, temperature=self.temperature, sample=n) for n in range(self.num_samples)
        ]
        return plurality(good(replies))

    def most_calls(self, num_models: int) -> int:
        return self.num_samples
