"""The next layer's router, asked with this layer's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods.caches import Key
from mixtura.methods.prefetchers import Prefetcher, Sight

METHOD = {
    "paper": 206,
    "title": "Accurate Expert Predictions in MoE Inference via Cross-Layer Gate",
    "tags": ["reads:gates"],
}


@final
class NextGate(Prefetcher):
    """Guess what the next layer's router says of the tokens that this layer's router was given.

    A layer adds little to the residual stream, so the inputs of neighbouring routers are much alike. While a
    layer's experts run, the next router's matrix is multiplied with this layer's tokens, and the experts that
    it likes best are read.

    Shapes:
        One layer's tokens at a time.

    Raises:
        SettingError: ``most`` is negative, or ``distance`` is not in [1, 64].

    Example:
        >>> sight = Sight(0, (1, 4), (5, 5), gates=lambda layer: (0.1, 0.2, 0.0, 0.4, 0.3))
        >>> [key.expert for key in NextGate().guess(sight)]
        [3, 4]

    Differences from the paper:
        Only its abstract and summaries of it were read. As many experts are guessed as this layer needed,
        unless ``most`` says otherwise, and always for the next layer, unless ``distance`` does. Corrections,
        groups and scaling of the family's router are left out of the guess. The paper's cache is the cache
        ``shallow``; its transfer in 2 bits changes what is computed and is not here.

    Reference:
        Accurate Expert Predictions in MoE Inference via Cross-Layer Gate (paper 206).
    """

    def __init__(self, *, most: int = 0, distance: int = 1) -> None:
        check_range("NextGate", "most", most, 0, 1 << 20)
        check_range("NextGate", "distance", distance, 1, 64)
        self.most = most
        self.distance = distance

    def guess(self, sight: Sight) -> Sequence[Key]:
        later = sight.layer + self.distance
        shares = sight.gates(later) if later < len(sight.num_experts) else None
        if shares is None:
            return ()
        best = sorted(range(len(shares)), key=lambda expert: (-shares[expert], expert))
        return [Key(later, expert) for expert in best[: self.most or len(sight.experts)]]
