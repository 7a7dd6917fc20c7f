"""Thinking in mixtures of tokens where a model is sure, and in tokens where it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.decoders import Branch, Candidate, Decoder, Prompt

METHOD = {
    "paper": 123,
    "title": "ThinkRouter: Efficient Reasoning via Routing Thinking between Latent and Discrete Spaces",
}


_END = "</think>"


@final
class ThinkRouter(Decoder):
    """Route every step of thinking: unsure steps draw a token, sure ones go on from a mean of embeddings.

    While the text has not come to ``end`` (``</think>`` unless said): where the likeliest token's probability
    is below ``threshold``, a token is drawn as usual; else the model goes on from the embeddings of its
    ``top`` likeliest tokens, each by its share of their probability. After ``end`` all is plain decoding.
    Where ``cold_steps`` steps in a row had an entropy below ``cold_entropy`` (in nats), thinking is ended.

    Shapes:
        Probabilities [B, V] to shares of embeddings [B, V].

    Raises:
        SettingError: a setting is out of range.

    Cost:
        One forward pass a token, of one row: weights outside experts and K experts a layer are read once. A
        mean of embeddings costs as much as a token.

    Example:
        >>> import torch
        >>> from mixtura.authoring.contracts.decoders import sample_prompt
        >>> from mixtura.methods.decoders import Candidate
        >>> router = ThinkRouter(threshold=0.5, top=2)
        >>> one = Candidate(prompt=sample_prompt(), branch=router.open(sample_prompt())[0])
        >>> router.soften(torch.tensor([[0.6, 0.2, 0.1, 0.1]]), [one])
        (tensor([True]), tensor([[0.7500, 0.2500, 0.0000, 0.0000]]))

    Differences from the paper:
        No code of the paper was found; this follows descriptions. The text shows the likeliest token of a
        mixture. The entropy of a cold stop is of this step's distribution.

    Reference:
        ThinkRouter: Efficient Reasoning via Routing Thinking between Latent and Discrete Spaces (paper 123).
    """

    neutral: ClassVar[Mapping[str, Any]] = {"threshold": 1.1}

    def __init__(
        self,
        *,
        threshold: float = 0.7,
        top: int = 10,
        end: str | None = None,
        cold_entropy: float = 0.01,
        cold_steps: int = 256,
    ) -> None:
        check_range("ThinkRouter", "threshold", threshold, 0, 1.1)
        check_range("ThinkRouter", "top", top, 1, 1 << 20)
        check_range("ThinkRouter", "cold_entropy", cold_entropy, 0, 100)
        check_range("ThinkRouter", "cold_steps", cold_steps, 1, 1 << 30)
        self.threshold = threshold
        self.top = top
        self.end = end
        self.cold_entropy = cold_entropy
        self.cold_steps = cold_steps

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        return (Branch(state=_Cold()),)

    def soften(
        self, probabilities: Float[Tensor, "B V"], candidates: Sequence[Candidate]
    ) -> tuple[Bool[Tensor, " B"], Float[Tensor, "B V"]] | None:
        thinking = torch.tensor([self._thinks(one) for one in candidates])
        sure = thinking & (probabilities.amax(-1) >= self.threshold)
        entropies = torch.special.entr(probabilities).sum(-1)
        for one, entropy in zip(candidates, entropies.tolist(), strict=True):
            one.branch.state.steps = one.branch.state.steps + 1 if entropy < self.cold_entropy else 0
        if not bool(sure.any()):
            return None
        values, places = probabilities.topk(min(self.top, probabilities.shape[-1]), dim=-1)
        shares = torch.zeros_like(probabilities).scatter(-1, places, values)
        return sure, shares / shares.sum(-1, keepdim=True)

    def force(self, candidate: Candidate) -> tuple[int, ...]:
        if self.threshold > 1 or not self._thinks(candidate):
            return ()
        cold = candidate.branch.state
        if cold.since is None:
            if cold.steps < self.cold_steps:
                return ()
            cold.since = len(candidate.token_ids)
        return candidate.prompt.encode(self.end or _END)[len(candidate.token_ids) - cold.since :]

    def _thinks(self, candidate: Candidate) -> bool:
        return (self.end or _END) not in candidate.text


@final
@dataclass(slots=True)
class _Cold:
    """Cold steps in a row so far, and where the end of thinking began to be said."""

    steps: int = 0
    since: int | None = None
