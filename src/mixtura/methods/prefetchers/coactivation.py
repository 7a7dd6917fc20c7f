"""Which experts followed these in recorded text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods.caches import Key
from mixtura.methods.prefetchers import Prefetcher, Sight

METHOD = {
    "paper": 211,
    "title": "EdgeMoE: Fast On-Device Inference of MoE-based Large Language Models",
    "tags": ["reads:trace"],
}


@final
class Coactivation(Prefetcher):
    """Guess the experts that most often followed this layer's in recorded text.

    A trace (`mixtura observe`) has, for each two neighbouring layers, how often an expert of the one was
    followed by one of the other for the same token. The chances of what follows each of this layer's experts
    are added up, and the likeliest are read.

    Shapes:
        One layer's experts at a time.

    Raises:
        SettingError: ``most`` is negative.

    Example:
        >>> method = Coactivation()
        >>> method.learn({0: [[8.0, 1.0, 1.0], [0.0, 0.0, 4.0], [5.0, 0.0, 5.0]]})
        >>> [key.expert for key in method.guess(Sight(0, (0, 1), (3, 3), gates=lambda layer: None))]
        [2, 0]

    Differences from the paper:
        Only its abstract was read: it predicts experts in advance and reads them before they are needed. That
        pairs of neighbouring layers are what it counts is our reading. As many experts are guessed as this
        layer needed, unless ``most`` says otherwise. Widths of experts are the business of ``mixtura fit``.

    Reference:
        EdgeMoE: Fast On-Device Inference of MoE-based Large Language Models (paper 211).
    """

    def __init__(self, *, most: int = 0) -> None:
        check_range("Coactivation", "most", most, 0, 1 << 20)
        self.most = most
        self._chances: dict[int, list[list[float]]] = {}

    def learn(self, pairs: Mapping[int, Sequence[Sequence[float]]]) -> None:
        self._chances = {
            layer: [[count / (sum(row) or 1) for count in row] for row in rows]
            for layer, rows in pairs.items()
        }

    def guess(self, sight: Sight) -> Sequence[Key]:
        rows, later = self._chances.get(sight.layer), sight.layer + 1
        if rows is None or later >= len(sight.num_experts):
            return ()
        following = [rows[expert] for expert in sight.experts if expert < len(rows)]
        chances = [sum(column) for column in zip(*following, strict=True)]
        best = sorted(range(len(chances)), key=lambda expert: (-chances[expert], expert))
        return [Key(later, expert) for expert in best[: self.most or len(sight.experts)]]
