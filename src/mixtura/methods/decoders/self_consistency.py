"""Several samples, of which the commonest answer is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from mixtura.errors import check_range
from mixtura.methods.decoders import Branch, Candidate, Decoder, Prompt
from mixtura.methods.decoders._shared import answer_of, most_voted, several

METHOD = {"paper": None, "title": "Self-consistency: a majority vote of samples", "tags": ["several"]}


@final
class SelfConsistency(Decoder):
    """Draw several solutions and give one whose answer most of them agree on (majority vote).

    A solution's answer is its last line, after the colon where it has one.

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
        >>> len(SelfConsistency(n=3).open(sample_prompt()))
        3
    """

    neutral: ClassVar[Mapping[str, Any]] = {"n": 1}

    def __init__(self, *, n: int = 8) -> None:
        check_range("SelfConsistency", "n", n, 1, 1024)
        self.n = n

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        return several(prompt, self.n)

    def select(self, candidates: Sequence[Candidate]) -> int:
        return most_voted([answer_of(one.text) for one in candidates])
