"""Drawing next tokens: the model's own ways of shaping what is drawn, a temperature for each branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mixtura.methods.decoders import Candidate

# transformers names so what cuts a distribution, which comes after the temperature.
_CUTTING = ("Warper", "LogitNormalization")


@final
class Drawing:
    """Draws tokens for candidates, from one generator of random numbers a prompt.

    What is drawn for a prompt is therefore the same whatever other prompts run beside it.
    """

    def __init__(self, processors: LogitsProcessorList, temperature: float, seed: int) -> None:
        self._shaping = [one for one in processors if not _cuts(one)]
        self._cutting = [one for one in processors if _cuts(one)]
        self._temperature = temperature
        self._seed = seed
        self._generators: dict[int, torch.Generator] = {}

    def temperature(self, candidate: Candidate) -> float:
        """Of a candidate's draws."""
        own = candidate.branch.temperature
        return self._temperature if own is None else own

    def draw(
        self, logits: Float[Tensor, "B V"], candidates: Sequence[Candidate]
    ) -> tuple[list[int], Float[Tensor, "B V"]]:
        """A token for each candidate, and the probabilities that it was drawn from (or could have been)."""
        temperatures = [self.temperature(one) for one in candidates]
        scores = self._processed(self._shaping, logits, candidates)
        # The likeliest token is that of the model, whatever its configuration says of draws.
        tokens = logits.argmax(-1).tolist()
        divided = scores / torch.tensor([t if t > 0 else 1.0 for t in temperatures])[:, None]
        probabilities = self._processed(self._cutting, divided, candidates).softmax(-1)
        for prompt in dict.fromkeys(id(one.prompt) for one in candidates):
            places = [
                place
                for place, one in enumerate(candidates)
                if id(one.prompt) == prompt and temperatures[place] > 0
            ]
            if places:
                drawn = torch.multinomial(probabilities[places], 1, generator=self._generator(prompt))
                for place, token in zip(places, drawn[:, 0].tolist(), strict=True):
                    tokens[place] = token
        return tokens, probabilities

    def _generator(self, prompt: int) -> torch.Generator:
        if prompt not in self._generators:
            self._generators[prompt] = torch.Generator().manual_seed(self._seed)
        return self._generators[prompt]

    def _processed(
        self,
        processors: Sequence[LogitsProcessor],
        scores: Float[Tensor, "B V"],
        candidates: Sequence[Candidate],
    ) -> Float[Tensor, "B V"]:
        if not processors:
            return scores
        made = []
        for row, one in zip(scores, candidates, strict=True):
            ids = torch.tensor([[*one.prompt.token_ids, *one.token_ids]])
            shaped = row[None]
            for process in processors:
                shaped = process(ids, shaped)
            made.append(shaped)
        return torch.cat(made)


def _cuts(processor: LogitsProcessor) -> bool:
    return type(processor).__name__.endswith(_CUTTING)
