"""Tokens to text while they come, and strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

# What decoders show of bytes that are no whole character yet.
_BROKEN = "\ufffd"
# A character is at most four bytes, so at most as many tokens can wait for its end.
_MOST_BROKEN = 6


@final
class TextReader:
    """The text of tokens that come one by one: whole characters, and nothing that may begin a stop.

    Args:
        tokenizer: the model's.
        stops: strings that end the text.
        keeps_special: keep special tokens in the text.

    What a tokenizer makes of a token depends on those before it, so some of them are decoded again each time.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), *, keeps_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stop for stop in stops if stop)
        self._skips = not keeps_special
        self._ids: list[int] = []
        # Tokens before `_shown` are out; decoding begins a little before them, at `_start`.
        self._start = self._shown = 0
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that is new with a token."""
        self._ids.append(token)
        before = self._decoded(self._start, self._shown)
        both = self._decoded(self._start, len(self._ids))
        waits = both.endswith(_BROKEN) and len(self._ids) - self._shown < _MOST_BROKEN
        if len(both) <= len(before) or waits:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return self._passed(both[len(before) :])

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        before = self._decoded(self._start, self._shown)
        rest = self._decoded(self._start, len(self._ids))[len(before) :]
        self._shown = len(self._ids)
        text = self._passed(rest)
        if self.is_stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _decoded(self, first: int, last: int) -> str:
        if first == last:
            return ""
        made: str = self._tokenizer.decode(
            self._ids[first:last], skip_special_tokens=self._skips, clean_up_tokenization_spaces=False
        )
        return made

    def _passed(self, new: str) -> str:
        """What may be shown of held and new text."""
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text a stop string begins with.

    >>> _overlap("a sto", "stop"), _overlap("stop", "xx")
    (3, 0)
    """
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
