"""One running text: its tokens, its cache, and what has come of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from mixtura.serving.engine.deciding import Decider
from mixtura.serving.engine.lanes import Lane
from mixtura.serving.engine.picking import Picker, described
from mixtura.serving.engine.records import Asked, Finish, OnPiece, Piece, Token
from mixtura.serving.engine.text import TextReader


@final
class Row:
    """A request on its way: first its prompt is read in parts, then it grows by a token a step.

    Attributes:
        lanes: the ways that the model runs on it, one but for decoders of several views.
        is_cancelled: whoever asked has gone; set on any thread.
    """

    def __init__(self, asked: Asked, on_piece: OnPiece, tokenizer: Any, end_ids: frozenset[int]) -> None:
        self.asked = asked
        self.ids = list(asked.prompt)
        self.num_prompt = len(asked.prompt)
        self.lanes: tuple[Lane, ...] = (Lane(asked, self.ids),)
        self.is_cancelled = False
        self.asked_at = time.perf_counter()
        self.last_token_at: float | None = None
        self._on_piece = on_piece
        self._end_ids = end_ids
        self._reader = TextReader(tokenizer, asked.stops, keeps_special=asked.keeps_special)
        self._picker: Picker | None = None
        self._decider: Decider | None = None
        self._prompt_tokens: list[Token] = []
        self._first = True
        self._last: Piece | None = None

    def open(self, decider: Decider) -> None:
        """Let a decoder decide how it grows; before it starts."""
        self._decider = decider
        self.lanes = tuple(Lane(self.asked, self.ids, view) for view in decider.views)

    @property
    def is_open(self) -> bool:
        """Whether it is known in which ways the model runs on it."""
        return self.asked.decoder is None or self._decider is not None

    def start(self, model: Any) -> None:
        """Make ready to pick tokens.

        Raises:
            UserError: the guide, or what the model's configuration says of drawing, cannot be used.
        """
        asked = self.asked
        guide = None if asked.guide is None else asked.guide()
        sampling = asked.sampling
        if self._decider is not None and self._decider.temperature is not None:
            sampling = replace(sampling, temperature=self._decider.temperature)
        self._picker = Picker(model, sampling, asked.prompt, guide, asked.num_top)

    @property
    def is_reading(self) -> bool:
        """Whether some of its prompt is still to be read."""
        return any(lane.is_reading for lane in self.lanes)

    @property
    def num_read(self) -> int:
        """Tokens that were read, in all ways together."""
        return sum(lane.num_read for lane in self.lanes)

    @property
    def num_cached(self) -> int:
        """Tokens of the prompt that were read in no way."""
        return min(lane.num_cached for lane in self.lanes)

    @property
    def num_new(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - self.num_prompt

    def see_prompt(self, logits: Float[Tensor, "T V"], first: int) -> None:
        """Note what the model says after the prompt's tokens from number ``first`` on."""
        num_top = self.asked.num_top or 0
        if not self._prompt_tokens:
            self._prompt_tokens.append(Token(self.ids[0]))
        for place, row in enumerate(logits, first + 1):
            if place < self.num_prompt:
                self._prompt_tokens.append(described(row, self.ids[place], num_top))

    def grow(self, logits: Sequence[Float[Tensor, " V"]]) -> Finish | None:
        """Pick a token from what lanes say and tell, unless it is the last; returns why it is, or None."""
        assert self._picker is not None
        if self.asked.max_new_tokens == 0:
            return self.finish("length")
        decider = self._decider
        token = self._picker.pick(logits[0] if decider is None else decider.mixed(logits))
        self.ids.append(token.token)
        if decider is not None:
            decider.take(token.token)
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
        """Make the last piece; `tell_end` tells it."""
        if why != "cancelled" and not self._reader.is_stopped:
            text += self._reader.end()
            why = "stop" if self._reader.is_stopped else why
        tokens = () if token is None else (token,)
        self._last = Piece(text=text, tokens=tokens, finish=why, **self._beginning())
        return why

    def fail(self, error: Exception) -> None:
        """It cannot go on, which `tell_end` tells."""
        self._last = Piece(error=error)

    def tell_end(self) -> None:
        """Tell the last piece, once all that the row held is free."""
        if self._last is not None:
            self._tell(self._last)

    def _beginning(self) -> dict[str, Any]:
        if not self._first:
            return {}
        prompt = tuple(self._prompt_tokens) if self.asked.reads_prompt else None
        return {"num_cached": self.num_cached, "prompt": prompt}

    def _tell(self, piece: Piece) -> None:
        self._first = False
        self._on_piece(piece)
