"""The likeliest token each time."""

from __future__ import annotations

from typing import final

from mixtura.methods.decoders import Branch, Decoder, Prompt

METHOD = {"paper": None, "title": "Greedy decoding"}


@final
class Greedy(Decoder):
    """Take the likeliest token each time, whatever temperature was asked for.

    The baseline of everything that changes what the model says.

    Shapes:
        Logits [V] to one token.

    Cost:
        One forward pass a token, of one row: weights outside experts and K experts a layer are read once.

    Example:
        >>> from mixtura.authoring.contracts.decoders import sample_prompt
        >>> Greedy().open(sample_prompt())[0].temperature
        0.0
    """

    neutral_at = (0.0,)

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        return (Branch(temperature=0.0),)
