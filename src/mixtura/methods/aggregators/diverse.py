"""One model, several ways to go about a problem."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import good, plain, plurality, question, told
from mixtura.types.models import ModelCard, Prompt

METHOD = {
    "paper": 161,
    "title": "Diversity of Thought Improves Reasoning Abilities of Large Language Models",
    "tags": ["votes"],
}
_WAYS = (
    "Name {count} different approaches to the following problem, one a line, each in a few words. Do "
    "not solve it.\n\n{question}"
)
_BY = "{question}\n\nSolve it by this approach: {way}. End with a line 'Answer: ...'."
_ALL = (
    "{question}\n\nSolve it by each of these approaches in turn:\n{ways}\n\nThen compare the results, "
    "and end with a line 'Answer: ...'."
)
# Where only chance makes answers differ.
_DRAWN = 0.7


@final
class Diverse(Aggregator):
    """Let a model name different approaches to a problem, solve it by each, and take the commonest answer.

    Answers that come by different ways fail in different ways, more than answers drawn by chance. With
    ``within_call`` all approaches are followed in one call, for the price of one longer answer.

    Shapes:
        One call for the approaches, then ``num_approaches`` at once, or one.

    Raises:
        SettingError: ``num_approaches`` is outside [1, 100].

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> plan = Diverse(approaches=["algebra", "a drawing"]).plan(
        ...     Prompt(id="0", text="2x = 4?"), (ModelCard(name="a"),))
        >>> verdict, asked = rehearse(plan, lambda ask: "Answer: 2")
        >>> len(asked), "a drawing" in asked[1].messages[0].content
        (2, True)

    Differences from the paper:
        Only the abstract was read. Approaches are asked for each prompt, or given once as ``approaches`` for
        a whole task; personas are approaches that a user writes there. The words of the prompts and the
        default of 5 are mixtura's. If no approach can be read from the reply the problem is asked as it is,
        as often, at temperature 0.7.

    Reference:
        Diversity of Thought Improves Reasoning Abilities of Large Language Models (paper 161).
    """

    def __init__(
        self, *, num_approaches: int = 5, within_call: bool = False, approaches: list[str] | None = None
    ) -> None:
        check_range(type(self).__name__, "num_approaches", num_approaches, 1, 100)
        self.num_approaches = num_approaches
        self.within_call = within_call
        self.approaches = approaches

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        name, asked = models[0].name, question(prompt)
        ways = list(self.approaches or ())
        if not ways:
            text = _WAYS.format(count=self.num_approaches, question=asked)
            (reply,) = yield [told(prompt, name, text)]
            lines = reply.text.splitlines() if reply.ok else []
            named = [re.sub(r"^\W*\d*\W*", "", line).strip() for line in lines]
            ways = [line for line in named if line][: self.num_approaches]
        if not ways:
            number = 1 if self.within_call else self.num_approaches
            replies = yield [plain(prompt, name, temperature=_DRAWN, sample=n) for n in range(number)]
        elif self.within_call:
            listed = "\n".join(f"- {way}" for way in ways)
            replies = yield [told(prompt, name, _ALL.format(question=asked, ways=listed))]
        else:
            replies = yield [
                told(prompt, name, _BY.format(question=asked, way=way), sample=n)
                for n, way in enumerate(ways)
            ]
        return plurality(good(replies))

    def most_calls(self, num_models: int) -> int:
        ways = len(self.approaches) if self.approaches else self.num_approaches
        return (not self.approaches) + (1 if self.within_call else ways)
