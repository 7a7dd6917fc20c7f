"""One running text: its tokens, its cache, and what has come of it."""

from __future__ import annotations

import time
from typing import Any, Final, final

from jaxtyping import Float
from torch import Tensor

from mixtura.serving.engine.picking import Picker, described
from mixtura.serving.engine.records import Asked, Finish, OnPiece, Piece, Token
from mixtura.serving.engine.text import TextReader

# Log-probabilities of a prompt are worked out for so many of its tokens at once.
PROMPT_LOGITS: Final = 32


@final
class Row:
    """A request on its way: first its prompt is read in parts, then it grows by a token a step.

    Attributes:
        cache: keys and values of the first ``num_read`` of ``ids``; None until it runs.
        reserved_bytes: memory that was set apart for it.
        is_cancelled: whoever asked has gone; set on any thread.
    """

    def __init__(self, asked: Asked, on_piece: OnPiece, tokenizer: Any, end_ids: frozenset[int]) -> None:
        self.asked = asked
        self.ids = list(asked.prompt)
        self.num_prompt = len(asked.prompt)
        self.cache: Any = None
        self.num_read = 0
        self.num_cached = 0
        self.reserved_bytes = 0
        self.is_cancelled = False
        self.asked_at = time.perf_counter()
        self.last_token_at: float | None = None
        self._on_piece = on_piece
        self._end_ids = end_ids
        self._reader = TextReader(tokenizer, asked.stops, keeps_special=asked.keeps_special)
        self._picker: Picker | None = None
        self._prompt_tokens: list[Token] = []
        self._first = True

    def start(self, model: Any) -> None:
        """Make ready to pick tokens.

        Raises:
            UserError: the guide, or what the model's configuration says of drawing, cannot be used.
        """
        asked = self.asked
        guide = None if asked.guide is None else asked.guide()
        self._picker = Picker(model, asked.sampling, asked.prompt, guide, asked.num_top)

    @property
    def is_reading(self) -> bool:
        """Whether some of its prompt is still to be read."""
        return self.num_read < self.num_prompt

    @property
    def num_new(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - self.num_prompt

    @property
    def room(self) -> int:
        """Tokens that it may come to, all told."""
        return self.num_prompt + self.asked.max_new_tokens

    def see_prompt(self, logits: Float[Tensor, "T V"], first: int) -> None:
        """Note what the model says after the prompt's tokens from number ``first`` on."""
        num_top = self.asked.num_top or 0
        if not self._prompt_tokens:
            self._prompt_tokens.append(Token(self.ids[0]))
        for place, row in enumerate(logits, first + 1):
            if place < self.num_prompt:
                self._prompt_tokens.append(described(row, self.ids[place], num_top))

    def grow(self, logits: Float[Tensor, " V"]) -> Finish | None:
        """Pick a token and tell; returns why it is the last, or None."""
        assert self._picker is not None
        if self.asked.max_new_tokens == 0:
            return self.finish("length")
        token = self._picker.pick(logits)
        self.ids.append(token.token)
        if token.token in self._end_ids:
            return self.finish("stop", token)
        text = self._reader.add(token.token)
        if self._reader.is_stopped or self._picker.is_over:
            return self.finish("stop", token, text)
        if self.num_new >= self.asked.max_new_tokens:
            return self.finish("length", token, text)
        self._tell(Piece(text=text, tokens=(token,), **self._beginning()))
        return None

    def finish(self, why: Finish, token: Token | None = None, text: str = "") -> Finish:
        """Tell the last piece."""
        if why != "cancelled" and not self._reader.is_stopped:
            text += self._reader.end()
            why = "stop" if self._reader.is_stopped else why
        tokens = () if token is None else (token,)
        self._tell(Piece(text=text, tokens=tokens, finish=why, **self._beginning()))
        return why

    def fail(self, error: Exception) -> None:
        """Tell that it cannot go on."""
        self._tell(Piece(error=error))

    def _beginning(self) -> dict[str, Any]:
        if not self._first:
            return {}
        prompt = tuple(self._prompt_tokens) if self.asked.reads_prompt else None
        return {"num_cached": self.num_cached, "prompt": prompt}

    def _tell(self, piece: Piece) -> None:
        self._first = False
        self._on_piece(piece)
