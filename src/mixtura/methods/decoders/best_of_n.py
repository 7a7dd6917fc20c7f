"""Several samples, of which the best is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from mixtura.errors import check_range
from mixtura.methods.decoders import Branch, Candidate, Decoder, Prompt
from mixtura.methods.decoders._shared import best_place, score_of, several

METHOD = {
    "paper": None,
    "title": "Best of n samples",
    "tags": ["several", "may_use:verifier", "reads:confidence"],
}


@final
class BestOfN(Decoder):
    """Draw several answers and give the best: by a verifier, else the one the model is surest of.

    Without a verifier the score is the mean log-probability of an answer's tokens at temperature 1.

    Draws are at the temperature asked for, 0.8 where none is.

    Shapes:
        Logits [n, V] to n tokens.

    Raises:
        SettingError: ``n`` is not in [1, 1024].

    Cost:
        The prompt is read once. Then one forward pass a token, of n rows: weights outside experts are read
        once for all of them, and up to n times K experts a layer.

    Example:
        >>> from mixtura.authoring.contracts.decoders import sample_prompt
        >>> len(BestOfN(n=4).open(sample_prompt()))
        4
    """

    neutral: ClassVar[Mapping[str, Any]] = {"n": 1}

    def __init__(self, *, n: int = 8) -> None:
        check_range("BestOfN", "n", n, 1, 1024)
        self.n = n

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        return several(prompt, self.n)

    def select(self, candidates: Sequence[Candidate]) -> int:
        return best_place([score_of(one) for one in candidates])
