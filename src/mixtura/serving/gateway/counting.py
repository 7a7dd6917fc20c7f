"""What a request can cost at most, and what an answer did: from counts, or estimated and called so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, final

from mixtura.running.composing.asking import AROUND_MESSAGE
from mixtura.types.models import CHARS_PER_TOKEN, ModelCard

# More tokens than any model reads or writes: a count beyond is none.
_MOST_TOKENS: Final = 1 << 31
_MOST_COST: Final = 1 << 61


@final
@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of a call.

    Attributes:
        read, written: of prompt and answer.
        estimated: whether nobody counted them.
    """

    read: int = 0
    written: int = 0
    estimated: bool = False

    def cost(self, card: ModelCard) -> int:
        """Pico-dollars; 0 where prices are not known."""
        return min(round(card.cost(self.read, self.written) or 0), _MOST_COST)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large a request is, whatever model it goes to.

    Attributes:
        bytes: of its body; a token of text has a byte or more, so they bound the tokens that are read.
        messages: around which a chat template writes something.
        wanted: tokens that each answer may have, as the request says.
        answers: number of them.
        has_media: whether something of it is no text, so that bytes bound nothing.
    """

    bytes: int
    messages: int
    wanted: int | None
    answers: int
    has_media: bool

    def limit(self, card: ModelCard, most: int) -> int:
        """Tokens that an answer of a model may have; ``most`` is for those of which nobody says."""
        limits = [one for one in (self.wanted, card.max_output) if one is not None]
        return min(limits, default=most)

    def bound(self, card: ModelCard, most: int, template: int) -> Tokens | None:
        """Tokens that a call takes at most; None where nobody can know."""
        read = self.bytes + AROUND_MESSAGE * self.messages + template
        if self.has_media:
            if card.context is None:
                return None
            read = card.context
        elif card.context is not None:
            read = min(read, card.context)
        return Tokens(read, self.limit(card, most) * self.answers)

    @property
    def read_estimate(self) -> int:
        """Tokens that it has, where nobody counted them."""
        return self.bytes // CHARS_PER_TOKEN + 1


def size_of(body: dict[str, Any], num_bytes: int) -> Size:
    """The size of a request's body."""
    messages = body.get("messages") or []
    prompts = body.get("prompt")
    several = isinstance(prompts, list) and bool(prompts) and not isinstance(prompts[0], int)
    texts = len(prompts) if several and prompts else 1
    wanted = body.get("max_completion_tokens")
    return Size(
        bytes=num_bytes,
        messages=len(messages) or texts,
        wanted=body.get("max_tokens") if wanted is None else wanted,
        answers=texts * max(body.get("n") or 1, body.get("best_of") or 1),
        has_media=any(_has_media(one.get("content")) for one in messages),
    )


def _has_media(content: Any) -> bool:
    if not isinstance(content, list):
        return False
    return any(not isinstance(part, dict) or part.get("type") not in ("text", "refusal") for part in content)


def counted(usage: Any, otherwise: Tokens) -> Tokens:
    """Tokens as an upstream counts them; an estimate where its counts are none.

    >>> counted({"prompt_tokens": 3, "completion_tokens": 2}, Tokens(9, 9, True))
    Tokens(read=3, written=2, estimated=False)
    >>> counted({"prompt_tokens": "many"}, Tokens(9, 9, True))
    Tokens(read=9, written=9, estimated=True)
    """
    if not isinstance(usage, dict):
        return replace(otherwise, estimated=True)
    found = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    if not all(
        isinstance(one, int) and not isinstance(one, bool) and 0 <= one < _MOST_TOKENS for one in found
    ):
        return replace(otherwise, estimated=True)
    return Tokens(int(found[0]), int(found[1]))  # type: ignore[arg-type]
