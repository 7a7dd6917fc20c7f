"""Cheap models first, dearer ones where they are not sure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import good, plain, plurality
from mixtura.types.asking import Verdict
from mixtura.types.models import ModelCard, Prompt

METHOD = {"paper": None, "title": "Cascade by agreement", "tags": ["replays", "samples"]}


@final
class Cascade(Aggregator):
    """Ask models from the cheapest to the dearest until one agrees with itself.

    Several answers of a model are drawn; where the share that agree reaches ``agreement`` the answer is
    taken, else the next model is asked. The dearest is asked once and believed. Agreement needs no training
    and no judge; on tasks whose answers cannot be compared it never stops early.

    Shapes:
        At most ``num_samples`` calls a model, one for the last.

    Raises:
        SettingError: ``num_samples`` is outside [1, 1000], or ``agreement`` or ``temperature`` out of range.

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> models = tuple(ModelCard(name=n, input_price=p, output_price=p) for n, p in (("b", 9), ("a", 1)))
        >>> for says in ("4", "{}"):
        ...     plan = Cascade(num_samples=2).plan(Prompt(id="0", text="2 + 2?"), models)
        ...     verdict, asked = rehearse(plan, lambda ask: says.format(ask.sample))
        ...     print(verdict.text, [ask.model for ask in asked])
        4 ['a', 'a']
        0 ['a', 'a', 'b']
    """

    def __init__(self, *, num_samples: int = 3, agreement: float = 1.0, temperature: float = 0.7) -> None:
        check_range(type(self).__name__, "num_samples", num_samples, 1, 1000)
        check_range(type(self).__name__, "agreement", agreement, 0, 1)
        check_range(type(self).__name__, "temperature", temperature, 0, 2)
        self.num_samples = num_samples
        self.agreement = agreement
        self.temperature = temperature

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        # Models without a price come last, as they stand.
        ordered = sorted(models, key=lambda card: _price(card))
        best = Verdict("", 0.0, abstained=True)
        for place, model in enumerate(ordered):
            if place == len(ordered) - 1:
                (reply,) = yield [plain(prompt, model.name)]
                return Verdict(reply.text) if reply.ok else best
            replies = yield [
                plain(prompt, model.name, temperature=self.temperature, sample=n)
                for n in range(self.num_samples)
            ]
            answers = good(replies)
            found = plurality(answers)
            if not found.abstained:
                # A sample that failed agrees with nothing.
                share = (found.confidence or 0.0) * len(answers) / self.num_samples
                best = Verdict(found.text, share)
                if share >= self.agreement:
                    return best
        return best

    def most_calls(self, num_models: int) -> int:
        return (num_models - 1) * self.num_samples + 1


def _price(card: ModelCard) -> float:
    return float("inf") if card.output_price is None else card.output_price
