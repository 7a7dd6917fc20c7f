"""Different models propose, in layers, and one writes the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import SYNTHESIS, good, numbered_list, plain, question, told
from mixtura.types.asking import Verdict
from mixtura.types.models import ModelCard, Prompt

METHOD = {"paper": None, "title": "Mixture of agents"}


@final
class MixtureOfAgents(Aggregator):
    """Let every model answer, then every model again with all answers before it, and the first write the end.

    The baseline that `self_moa` is held against: the same number of calls, spread over different models.

    Shapes:
        M calls a layer, then one.

    Raises:
        SettingError: ``num_layers`` is outside [1, 16].

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> models = tuple(ModelCard(name=name) for name in "ab")
        >>> plan = MixtureOfAgents().plan(Prompt(id="0", text="Why?"), models)
        >>> verdict, asked = rehearse(plan, lambda ask: ask.model if ask.plain else "joined")
        >>> verdict.text, [ask.model for ask in asked]
        ('joined', ['a', 'b', 'a'])

    Reference:
        A baseline of Rethinking Mixture-of-Agents: Is Mixing Different Large Language Models Beneficial?
        (paper 171).
    """

    def __init__(self, *, num_layers: int = 1) -> None:
        check_range(type(self).__name__, "num_layers", num_layers, 1, 16)
        self.num_layers = num_layers

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        replies = yield [plain(prompt, model.name) for model in models]
        drafts = good(replies)
        for layer in range(self.num_layers):
            if not drafts:
                return Verdict("", abstained=True)
            text = SYNTHESIS.format(question=question(prompt), answers=numbered_list(drafts))
            is_last = layer == self.num_layers - 1
            asked = models[:1] if is_last else models
            replies = yield [told(prompt, model.name, text) for model in asked]
            # What nobody improved stays.
            drafts = good(replies) or drafts
        return Verdict(drafts[0])

    def most_calls(self, num_models: int) -> int:
        return num_models * self.num_layers + 1
