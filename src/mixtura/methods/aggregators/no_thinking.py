"""Reasoning models without their reasoning, several times at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, final

from mixtura.errors import check_range
from mixtura.methods.aggregators import Aggregator, Plan
from mixtura.methods.aggregators._shared import plain, plurality
from mixtura.types.asking import Verdict
from mixtura.types.models import ModelCard, Prompt

METHOD = {
    "paper": 148,
    "title": "Reasoning Models Can Be Effective Without Thinking",
    "tags": ["samples", "needs:prefill"],
}


@final
class NoThinking(Aggregator):
    """Begin the answer with a finished, empty block of thoughts; draw several and choose among them.

    For the tokens of one long thought a model gives many short answers, at the same time. They are chosen by
    the model's own confidence, the mean log-probability of an answer's tokens, or by a plurality.

    Shapes:
        ``num_samples`` calls at once.

    Raises:
        SettingError: ``num_samples`` is outside [1, 1000], ``temperature`` outside [0, 2], or ``choice`` is
            neither "vote" nor "confidence".

    Example:
        >>> from mixtura.methods.aggregators import rehearse
        >>> plan = NoThinking(num_samples=3).plan(Prompt(id="0", text="?"), (ModelCard(name="a"),))
        >>> verdict, asked = rehearse(plan, lambda ask: "yes" if ask.sample else "no")
        >>> verdict.text, "</think>" in asked[0].prefill
        ('yes', True)

    Differences from the paper:
        Without a verifier, which the paper uses where a task has one. Confidence is the mean log-probability,
        where the server gives it; the paper's is of the distribution over the vocabulary. Where a reply has
        none the vote decides. The opening is the sentence that the paper is known for, in the tags of models
        that write ``<think>``; others need another ``prefill``. The number of samples is mixtura's default.

    Reference:
        Reasoning Models Can Be Effective Without Thinking (paper 148).
    """

    def __init__(
        self,
        *,
        num_samples: int = 8,
        temperature: float = 0.7,
        choice: Literal["vote", "confidence"] = "vote",
        thoughts: list[str] | None = None,
    ) -> None:
        check_range(type(self).__name__, "num_samples", num_samples, 1, 1000)
        check_range(type(self).__name__, "temperature", temperature, 0, 2)
        self.num_samples = num_samples
        self.temperature = temperature
        self.choice = choice
        self.thoughts = thoughts

    @property
    def prefill(self) -> str:
        """What answers begin with; ``thoughts`` are its lines where they are given."""
        lines = self.thoughts or ["<think>", "Okay, I think I have finished thinking.", "</think>", "", ""]
        return "\n".join(lines)

    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        name = models[0].name
        asks = [plain(prompt, name, temperature=self.temperature, sample=n) for n in range(self.num_samples)]
        replies = yield [replace(ask, prefill=self.prefill, plain=False) for ask in asks]
        answers = [reply for reply in replies if reply.ok]
        sure = [reply for reply in answers if reply.logprob is not None]
        if self.choice == "confidence" and sure and len(sure) == len(answers):
            best = max(sure, key=lambda reply: reply.logprob or 0.0)
            return Verdict(best.text)
        return plurality([reply.text for reply in answers])

    def most_calls(self, num_models: int) -> int:
        return self.num_samples
