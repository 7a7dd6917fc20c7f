"""Like questions with worked answers, and options shown in other orders, then a vote."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import final

from mixtura.errors import UserError, check_range
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import alike, answer_in, question, told
from mixtura.types.asking import Verdict
from mixtura.types.models import ModelCard, Prompt

METHOD = {
    "paper": 208,
    "title": "Can Generalist Foundation Models Outcompete Special-Purpose Tuning? Case Study in Medicine",
    "tags": ["needs:examples", "needs:options"],
}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_END = "Think step by step and end with a line 'Answer: ' and the letter."


@final
class Medprompt(Aggregator):
    """Show the most similar worked questions, ask several times with the options in other orders, and vote.

    For questions with options, which stand in the label ``options``, one a line. A model that prefers a
    letter gives every option as many votes where each stands at each letter equally often, and so decides
    nothing.

    Shapes:
        ``num_orders`` calls at once.

    Raises:
        SettingError: ``num_orders`` is outside [1, 100] or ``num_examples`` outside [0, 100].
        UserError: a prompt has no two options.

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> options = {"options": chr(10).join(["Paris", "Rome"])}
        >>> prompt = Prompt(id="0", text="Capital of Italy?", labels=options)
        >>> says = lambda ask: "Answer: " + ask.messages[-1].content.partition(") Rome")[0][-1]
        >>> rehearse(Medprompt().plan(prompt, (ModelCard(name="a"),)), says)[0].text
        'Rome'

    Differences from the paper:
        Examples are those studied, which should be worked answers of the model's own that were right, from
        questions that are not measured on; the published code also shows the test run's own answers, kept by
        their labels. Likeness is of words, there of embeddings. Among equally many votes there is no answer;
        in that code the last distinct one wins. Orders are as different as can be: rotations of one shuffle,
        so that each option stands at each letter equally often where ``num_orders`` is a multiple of their
        number. Letters of the examples are as they were studied, not balanced.

    Reference:
        Can Generalist Foundation Models Outcompete Special-Purpose Tuning? Case Study in Medicine (paper
        208); code microsoft/promptbase.
    """

    def __init__(self, *, num_orders: int = 5, num_examples: int = 5, seed: int = 0) -> None:
        check_range(type(self).__name__, "num_orders", num_orders, 1, 100)
        check_range(type(self).__name__, "num_examples", num_examples, 0, 100)
        self.num_orders = num_orders
        self.num_examples = num_examples
        self.seed = seed
        self._examples: tuple[tuple[str, str], ...] = ()

    def study(self, examples: Sequence[tuple[str, str]]) -> None:
        self._examples = tuple(examples)

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        options = [line for line in prompt.labels.get("options", "").splitlines() if line.strip()]
        if not 2 <= len(options) <= len(_LETTERS):
            raise UserError("medprompt needs the label 'options' on a prompt: two or more, one a line")
        asked = question(prompt)
        near = sorted(self._examples, key=lambda one: -alike(one[0], asked))[: self.num_examples]
        # The most like stands last, next to the question.
        shown = [f"Question: {known}\n{worked}\n" for known, worked in reversed(near)]
        mixed = random.Random(f"{self.seed} {asked}").sample(range(len(options)), len(options))
        orders = [mixed[n % len(mixed) :] + mixed[: n % len(mixed)] for n in range(self.num_orders)]
        asks = []
        for n, order in enumerate(orders):
            listed = "\n".join(f"{_LETTERS[at]}) {options[place]}" for at, place in enumerate(order))
            text = "\n".join([*shown, f"Question: {asked}", listed, _END])
            asks.append(told(prompt, models[0].name, text, sample=n))
        replies = yield asks
        votes: Counter[int] = Counter()
        for order, reply in zip(orders, replies, strict=True):
            letter = re.fullmatch(r"\(?([a-z])\b.*", answer_in(reply.text)) if reply.ok else None
            if letter and (at := ord(letter[1]) - ord("a")) < len(order):
                votes[order[at]] += 1
        ranked = votes.most_common()
        if not ranked or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]):
            return Verdict("", 0.0, abstained=True)
        return Verdict(options[ranked[0][0]], ranked[0][1] / votes.total())

    def most_calls(self, num_models: int) -> int:
        return self.num_orders
