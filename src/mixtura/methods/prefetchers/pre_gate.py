"""A gate of each layer that decides what the next one's experts will be, tuned while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.caches import Key
from mixtura.methods.prefetchers import Prefetcher, Sight

METHOD = {
    "paper": 179,
    "title": (
        "Pre-gated MoE: An Algorithm-System Co-Design for Fast and Scalable Mixture-of-Expert Inference"
    ),
    "tags": ["reads:gates", "reads:tokens"],
}


@final
class PreGate(Prefetcher):
    """Guess by a gate of this layer's own for the next layer's experts, which is tuned on every token.

    A pre-gate begins as a copy of the next layer's router and reads this layer's tokens. What the next layer
    then needs is what it should have said, so it is tuned a step at a time (``rate``, of a cross-entropy)
    towards that, with no trace and no second model. The model's own routers go on deciding: answers are those
    without it, to the bit, and a wrong guess costs a read alone.

    Shapes:
        Of each layer but the last, what was learned: [E, 1 + D], a bias and a row by expert of the next.

    Raises:
        SettingError: ``rate`` or ``most`` is negative, or ``least`` is not in [0, 1].

    Example:
        >>> method, found = PreGate(), []
        >>> for token in range(20):
        ...     x = torch.eye(2)[token % 2][None]
        ...     for layer, expert in ((0, 0), (1, 2 + token % 2)):
        ...         found.append(method.guess(Sight(layer, (expert,), (4, 4), lambda later: None, x)))
        >>> found[-4], found[-2]
        ([Key(layer=1, expert=2)], [Key(layer=1, expert=3)])

    Differences from the paper:
        There the pre-gate decides, so that the next layer has the experts that were fetched, and the model is
        fine-tuned with it beforehand: that changes answers, and is the router ``pre_gated`` here, for models
        that are trained so. This one guesses and is tuned online. Its matrix is the next router's, as
        `Sight.gates` gives it, and what was learned on top; of several tokens the mean is read. The paper's
        first layer has a gate of its own as well; here nothing precedes it that could guess. As many experts
        are guessed as this layer needed, unless ``most`` says otherwise, those of at least ``least`` of the
        weight. Only the abstract and summaries were read.

    Reference:
        Pre-gated MoE: An Algorithm-System Co-Design for Fast and Scalable Mixture-of-Expert Inference
        (paper 179).
    """

    def __init__(self, *, rate: float = 0.3, most: int = 0, least: float = 0.0) -> None:
        check_range("PreGate", "rate", rate, 0.0, 1e6)
        check_range("PreGate", "most", most, 0, 1 << 20)
        check_range("PreGate", "least", least, 0.0, 1.0)
        self.rate = rate
        self.most = most
        self.least = least
        self._learned: dict[int, Tensor] = {}
        # Of the layer that is next: what its pre-gate read, and each expert's share as it said.
        self._said: tuple[int, Tensor, Tensor] | None = None

    def num_bytes(self, num_experts: Sequence[int], width: int) -> int:
        return sum(4 * later * (1 + width) for later in num_experts[1:])

    def begin(self) -> None:
        self._said = None

    def guess(self, sight: Sight) -> Sequence[Key]:
        self._settle(sight)
        later = sight.layer + 1
        if later >= len(sight.num_experts):
            return ()
        copied = sight.gates(later)
        if copied is None and sight.tokens is None:
            return ()
        logits = torch.zeros(sight.num_experts[later])
        if copied is not None:
            logits = torch.tensor(copied).clamp_min(1e-9).log()
        if sight.tokens is not None:
            mean = sight.tokens.detach().float().mean(0).cpu()
            read = torch.cat([torch.ones(1), mean / mean.norm().clamp_min(1e-9)])
            if later not in self._learned:
                self._learned[later] = torch.zeros(len(logits), len(read))
            logits = logits + self._learned[later] @ read
            self._said = later, read, logits.softmax(0)
        shares = logits.softmax(0)
        best = shares.argsort(descending=True, stable=True)[: self.most or len(sight.experts)].tolist()
        return [Key(later, expert) for expert in best if shares[expert] >= self.least]

    def _settle(self, sight: Sight) -> None:
        """Tune the pre-gate of the layer before on what this one needs."""
        said, self._said = self._said, None
        if said is None or said[0] != sight.layer:
            return
        _, read, shares = said
        wanted = torch.zeros_like(shares)
        wanted[list(sight.experts)] = 1 / max(len(sight.experts), 1)
        self._learned[sight.layer] += self.rate * torch.outer(wanted - shares, read)
