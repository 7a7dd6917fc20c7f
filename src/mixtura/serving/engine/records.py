"""What a request asks of the engine, and what it gets back, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, final, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UserError
from mixtura.methods.decoders import Decoder

# Why an answer ended: an end token or a stop string; as many tokens as were asked for; somebody took it back.
Finish = Literal["stop", "length", "cancelled"]


class BusyError(UserError):
    """There are as many requests as the server takes; ``retry_after_s`` says when to try again."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLongError(UserError):
    """A prompt, or a prompt and its answer, that is longer than the server can hold."""


class ClosingError(UserError):
    """The server is being shut down and takes no more requests."""


@runtime_checkable
class Adapters(Protocol):
    """Several adapters on one model; see `mixtura.adapting.selecting`."""

    names: tuple[str, ...]
    mixes: bool

    def choose(self, names: Sequence[str | None]) -> None:
        """The adapter of each row of the passes to come, None for the model as it is."""
        ...


@runtime_checkable
class Guide(Protocol):
    """Which tokens may come next; one guide a text."""

    def restrict(self, logits: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
        """The logits with what may not come at minus infinity."""
        ...

    def take(self, token: int) -> None:
        """A token was chosen."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether nothing may come any more."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are picked.

    Attributes:
        temperature: 0 takes the likeliest; None is as the model's generation_config.json says, else 1.
        top_p: draws from the likeliest tokens that have this share together; None as the model says.
        seed: of the draws; None for another one each time.
        presence_penalty: taken from the logit of every token that the answer has already.
        frequency_penalty: the same, times how often.
        logit_bias: added to logits, by token.
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One text to be continued.

    Attributes:
        prompt: its tokens, at least one.
        max_new_tokens: at most so many; 0 reads the prompt only.
        sampling: how they are picked.
        stops: strings that end the answer, and are not part of it.
        guide: made anew for the text; None for free text.
        num_top: likeliest tokens to report for each token, beside its own log-probability; None for neither.
        reads_prompt: report log-probabilities of the prompt's tokens, too.
        keeps_special: keep special tokens in the text, for parsers that look for them.
        group: requests of one group have the same prompt, which is read once.
        adapter: the adapter that it runs with; None for the model as it is.
        decoder: what decides how it is continued; None for the model as it is.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stops: tuple[str, ...] = ()
    guide: Callable[[], Guide] | None = None
    num_top: int | None = None
    reads_prompt: bool = False
    keeps_special: bool = False
    group: object = None
    adapter: str | None = None
    decoder: Decoder | None = None


class Likely(NamedTuple):
    """A token and the logarithm of its probability, before a temperature or anything else changed it."""

    token: int
    logprob: float


class Token(NamedTuple):
    """A token of a text. ``logprob`` is None where it was not asked for, and for a text's first token."""

    token: int
    logprob: float | None = None
    top: tuple[Likely, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What came of a request since the last piece.

    Attributes:
        text: new text; tokens that end in the middle of a character, or may begin a stop string, wait.
        tokens: new tokens.
        prompt: the prompt's tokens with log-probabilities, once, where they were asked for.
        num_cached: tokens of the prompt that were not read again; with the first piece.
        finish: why it ended, with the last piece.
        error: what went wrong; the last piece, too.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    prompt: tuple[Token, ...] | None = None
    num_cached: int | None = None
    finish: Finish | None = None
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it."""
        return self.finish is not None or self.error is not None


# Told each piece, on the engine's thread: it must not wait.
OnPiece = Callable[[Piece], None]
