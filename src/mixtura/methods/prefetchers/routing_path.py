"""A small predictor of each layer's experts that learns from the paths of tokens while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.caches import Key
from mixtura.methods.prefetchers import Prefetcher, Sight

METHOD = {
    "paper": 63,
    "title": "ExpertFlow: Optimized Expert Activation and Token Allocation for Efficient Mixture-of-Experts "
    "Inference",
}


@final
class RoutingPath(Prefetcher):
    """Guess the next layer's experts from the path that the token took, and correct the guess each time.

    For each layer there is a logistic regression with one output an expert: whether it will be needed. It
    reads which experts the layers before have just needed, and which the layer itself needed for the token
    before. When the layer is reached, the error of the guess is taken a step back (``rate``). So it needs no
    trace and follows the text; in the first dozens of tokens it knows little.

    Shapes:
        One layer's experts at a time.

    Raises:
        SettingError: ``depth`` is not in [1, 64], ``rate`` is not positive, or ``least`` not in [0, 1].

    Example:
        >>> method, found = RoutingPath(), []
        >>> for token in range(40):
        ...     sights = [Sight(n, (token % 2,), (4, 4), lambda layer: None) for n in (0, 1)]
        ...     found = [method.guess(sight) for sight in sights]
        >>> found[0]
        [Key(layer=1, expert=1)]

    Differences from the paper:
        The authors train a transformer on recorded tokens, which says the experts of all layers before a text
        is run, and correct the cache while it runs. Here the predictor is linear, sees ``depth`` layers back,
        says the experts of the next layer only, and learns online. As many experts are guessed as this layer
        needed, those likelier than ``least``. Their scheduling of tokens over batches is not here.

    Reference:
        ExpertFlow: Optimized Expert Activation and Token Allocation for Efficient Mixture-of-Experts
        Inference (paper 63).
    """

    def __init__(self, *, depth: int = 2, rate: float = 0.2, least: float = 0.0) -> None:
        check_range("RoutingPath", "depth", depth, 1, 64)
        check_range("RoutingPath", "rate", rate, 1e-9, 1e9)
        check_range("RoutingPath", "least", least, 0.0, 1.0)
        self.depth = depth
        self.rate = rate
        self.least = least
        self._weights: dict[int, Tensor] = {}
        self._needed: dict[int, Tensor] = {}
        # Of the layer that is next: what was read, and how likely each expert was said to be.
        self._said: tuple[int, Tensor, Tensor] | None = None

    def num_bytes(self, num_experts: Sequence[int], width: int) -> int:
        del width
        return sum(
            4 * num * (1 + sum(num_experts[max(0, layer - self.depth) : layer + 1]))
            for layer, num in enumerate(num_experts)
            if layer
        )

    def begin(self) -> None:
        self._needed.clear()
        self._said = None

    def guess(self, sight: Sight) -> Sequence[Key]:
        here = torch.zeros(sight.num_experts[sight.layer])
        here[list(sight.experts)] = 1.0
        if self._said is not None and self._said[0] == sight.layer:
            _, read, chances = self._said
            step = self.rate * torch.outer(here - chances, read) / read.sum()
            self._weights[sight.layer] += step
        self._said = None
        self._needed[sight.layer] = here
        later = sight.layer + 1
        if later >= len(sight.num_experts):
            return ()
        read = self._read(sight, later)
        if later not in self._weights:
            self._weights[later] = torch.zeros(sight.num_experts[later], len(read))
        chances = (self._weights[later] @ read).sigmoid()
        self._said = later, read, chances
        likeliest = chances.argsort(descending=True, stable=True)[: len(sight.experts)].tolist()
        return [Key(later, expert) for expert in likeliest if chances[expert] >= self.least]

    def _read(self, sight: Sight, later: int) -> Tensor:
        """What a layer's regression is given: what was needed before it, and by itself for the last token."""
        layers = range(max(0, later - self.depth), later + 1)
        parts = [self._needed.get(layer, torch.zeros(sight.num_experts[layer])) for layer in layers]
        return torch.cat([torch.ones(1), *parts])
