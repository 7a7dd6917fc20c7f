"""Asking whole models: what is asked, what came back, and what it all came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, final

from mixtura.types.models import Message

# Down: there was no connection, so that nothing was asked.
Outcome = Literal[
    "ok", "refused", "rate", "auth", "quota", "timeout", "broken", "down", "cancelled", "budget"
]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One call that a plan wants made.

    Attributes:
        model: the name of its card.
        messages: the conversation.
        temperature: 0 takes the likeliest token each time.
        sample: which of several answers to the same question, from 0; other numbers draw anew.
        max_tokens: that the answer may have; None for what prompt and card allow.
        prefill: what the answer begins with, for models that can go on from it.
        plain: whether it is the user's own prompt, unchanged, so that a table of answers can reply.
    """

    model: str
    messages: tuple[Message, ...]
    temperature: float = 0.0
    sample: int = 0
    max_tokens: int | None = None
    prefill: str = ""
    plain: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came of an ask.

    Attributes:
        text: the answer; empty unless the outcome is ok.
        outcome: ok, or why there is no answer.
        input_tokens, output_tokens: as the model counted them, else estimated.
        cost: pico-dollars.
        latency_ms: from sending to the last byte.
        logprob: mean log-probability of the answer's tokens, where the model says it.
    """

    text: str = ""
    outcome: Outcome = "ok"
    input_tokens: int = 0
    output_tokens: int = 0
    cost: int = 0
    latency_ms: float = 0.0
    logprob: float | None = None

    @property
    def ok(self) -> bool:
        """Whether there is an answer."""
        return self.outcome == "ok"


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """What a plan concludes.

    Attributes:
        text: the answer; empty where it abstains.
        confidence: in [0, 1], where the plan has one; it is no probability.
        abstained: whether no answer is given on purpose.
    """

    text: str
    confidence: float | None = None
    abstained: bool = False


@final
@dataclass(frozen=True, slots=True)
class Call:
    """One call that was made, in the order of a plan."""

    ask: Ask
    reply: Reply


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a prompt, with every call that it took.

    Attributes:
        text: the answer; empty where the plan abstained.
        confidence: of the plan's verdict.
        abstained: whether no answer is given on purpose.
        calls: all, those that failed included.
    """

    text: str
    confidence: float | None
    abstained: bool
    calls: tuple[Call, ...] = field(repr=False)

    @property
    def cost(self) -> int:
        """Pico-dollars of all calls."""
        return sum(call.reply.cost for call in self.calls)
