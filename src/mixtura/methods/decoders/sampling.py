"""Drawing tokens from the model's distribution."""

from __future__ import annotations

from typing import final

from mixtura.methods.decoders import Branch, Decoder, Prompt

METHOD = {"paper": None, "title": "Sampling with a temperature"}


@final
class Sampling(Decoder):
    """Draw each token from the model's distribution at the temperature asked for, 1 where none is.

    What the model's ``generation_config.json`` says of draws (``top_p``, ``min_p`` and so on) holds.

    Shapes:
        Logits [V] to one token.

    Cost:
        One forward pass a token, of one row: weights outside experts and K experts a layer are read once.

    Example:
        >>> from mixtura.authoring.contracts.decoders import sample_prompt
        >>> Sampling().open(sample_prompt())[0].temperature
        1.0
    """

    neutral_at = (0.9,)

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        return (Branch(temperature=prompt.temperature or 1.0),)
