"""Making one answer of several calls to whole models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence

from mixtura.methods.aggregators._shared import answer_in
from mixtura.types.asking import Ask, Reply, Verdict
from mixtura.types.models import ModelCard, Prompt

KIND = {
    "base": "Aggregator",
    "summary": "Makes one answer of several calls to whole models.",
    "tags": {
        "replays": "asks nothing but the user's own prompt, so that a table of answers can reply",
        "votes": "the answer that most replies give; their order matters only between equals",
        "samples": "draws several answers of one model",
        "needs:prefill": "asks models to go on from the beginning of an answer",
        "needs:options": "chooses among answers that a prompt's labels give, and needs these labels",
        "needs:examples": "shows models worked examples that it is given (`Aggregator.study`)",
    },
}
Plan = Generator[Sequence[Ask], Sequence[Reply], Verdict]

__all__ = ["KIND", "Aggregator", "Plan", "answer_in", "rehearse"]


class Aggregator(ABC):
    """Says what to ask next, and in the end what the answer is; the core asks.

    A method is a generator without input or output: it yields batches of asks, is sent as many replies in the
    same order, and returns a verdict. So one and the same plan runs on a table of answers, on models behind
    an address, and for many prompts in step. A call that failed, or that the budget did not allow, comes back
    as a reply that is not ok; the plan goes on with what it has.
    """

    @abstractmethod
    def plan(self, prompt: Prompt, models: Sequence[ModelCard]) -> Plan:
        """The calls for one prompt.

        Args:
            prompt: what is to be answered.
            models: those that may be asked, the preferred first; one or more.
        """

    @abstractmethod
    def most_calls(self, num_models: int) -> int:
        """The number of calls that no plan goes beyond with so many models."""

    def study(self, examples: Sequence[tuple[str, str]]) -> None:
        """Be given questions with worked answers; only a method with the tag ``needs:examples`` listens."""
        del examples


def rehearse(plan: Plan, answer: Callable[[Ask], Reply | str]) -> tuple[Verdict, list[Ask]]:
    """Run a plan on a function in place of models: its verdict and all that it asked, in order."""
    asked: list[Ask] = []
    try:
        batch = next(plan)
        while True:
            asked += batch
            given = [answer(ask) for ask in batch]
            batch = plan.send([Reply(text=one) if isinstance(one, str) else one for one in given])
    except StopIteration as end:
        return end.value, asked
