"""One way that a model runs on a text: what of it was read so, and the keys and values of that."""

from __future__ import annotations

import hashlib
from typing import Any, Final, final

from mixtura.methods.decoders import View
from mixtura.serving.engine.records import Asked

PLAIN: Final = View()
# Log-probabilities of a prompt are worked out for so many of its tokens at once.
PROMPT_LOGITS: Final = 32


@final
class Lane:
    """A text under one view of a decoder; a text without a decoder has one, of the model as it is.

    Args:
        asked: the text.
        ids: its tokens so far; the list grows as the text does.
        view: how the model is run on it.

    Attributes:
        cache: keys and values of the first ``num_read`` of ``ids``; None until it runs.
        num_cached: tokens that were not read, because they had been.
        reserved_bytes: memory that was set apart for it.
        read_as: beginnings for which this is the same have the same keys and values.
    """

    def __init__(self, asked: Asked, ids: list[int], view: View = PLAIN) -> None:
        self.asked = asked
        self.ids = ids
        self.view = view
        self.num_prompt = len(asked.prompt)
        self.cache: Any = None
        self.num_read = 0
        self.num_cached = 0
        self.reserved_bytes = 0
        reads_steered = bool(view.steering) and view.since == "prompt"
        self.read_as = (asked.adapter, _digest(view) if reads_steered else "")

    @property
    def is_reading(self) -> bool:
        """Whether some of its prompt is still to be read."""
        return self.num_read < self.num_prompt

    @property
    def room(self) -> int:
        """Tokens that it may come to, all told."""
        return self.num_prompt + self.asked.max_new_tokens

    @property
    def num_alike(self) -> int:
        """Tokens from the first on that were read as ``read_as`` says; later ones may have been otherwise."""
        view = self.view
        if view.skipped or (view.steering and view.since == "new"):
            return min(self.num_read, self.num_prompt)
        if view.steering and view.since == "last":
            return min(self.num_read, self.num_prompt - 1)
        return self.num_read


def _digest(view: View) -> str:
    """A name for what a view changes about routing."""
    made = hashlib.sha256()
    for index, steering in sorted(view.steering.items()):
        for name in steering.given:
            value = getattr(steering, name).detach().cpu().double().contiguous()
            made.update(f"{index} {name} {tuple(value.shape)}".encode())
            made.update(value.numpy().tobytes())
    return made.hexdigest()
