"""A decoder that forks and drops branches."""

from __future__ import annotations

from collections.abc import Sequence

from mixtura.methods.decoders import Branch, Candidate, Decoder, Prompt

METHOD = {"tags": ["several", "searches"]}


class Forking(Decoder):
    """Two branches; at every third token the first is forked and the other dropped."""

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        return (Branch(temperature=1.0),) * 2

    def ends_step(self, candidate: Candidate) -> bool:
        return len(candidate.token_ids) % 3 == 0

    def choose(self, candidates: Sequence[Candidate]) -> Sequence[int]:
        return (0, 0)
