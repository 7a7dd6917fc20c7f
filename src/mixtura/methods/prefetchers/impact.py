"""Coming layers' routers, asked with this layer's tokens, and believed as far as they were right before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import final

from mixtura.errors import check_range
from mixtura.methods.caches import Key
from mixtura.methods.prefetchers import Prefetcher, Sight

METHOD = {
    "paper": 159,
    "title": "HybriMoE: Hybrid CPU-GPU Scheduling and Cache Management for Efficient MoE Inference",
    "tags": ["reads:gates"],
}


@final
class Impact(Prefetcher):
    """Guess for several layers to come, what saves the most waiting first.

    The routers of the next ``distance`` layers are asked what they would make of this layer's tokens. How
    much an expert is worth reading is how likely it is to be needed, since reading each takes the same time:
    as often as experts of its place in such a list, so many layers ahead, were needed before in this run.
    What is likelier not to be needed than ``least`` is not guessed, so that a byte read in vain is rare even
    where routers cannot be foreseen; of what is equally likely, the nearest layer comes first.

    Shapes:
        One layer's tokens at a time.

    Raises:
        SettingError: ``distance`` is not in [1, 64], or ``least`` not in [0, 1].

    Example:
        >>> sight = Sight(0, (1, 4), (5, 5), gates=lambda layer: (0.1, 0.2, 0.0, 0.4, 0.3))
        >>> [key.expert for key in Impact().guess(sight)]
        [3, 4]

    Differences from the paper:
        The authors predict the next three layers by their gates and simulate, for each candidate, by how much
        the schedule of a CPU and a GPU would shorten. Here there is one queue, the disk's, and what a read
        saves is its chance times its time; the chances are counted as the model runs. Before anything was
        counted they are taken for ``hope``.

    Reference:
        HybriMoE: Hybrid CPU-GPU Scheduling and Cache Management for Efficient MoE Inference (paper 159).
    """

    def __init__(self, *, distance: int = 3, least: float = 0.5, hope: float = 0.6) -> None:
        check_range("Impact", "distance", distance, 1, 64)
        check_range("Impact", "least", least, 0.0, 1.0)
        check_range("Impact", "hope", hope, 0.0, 1.0)
        self.distance = distance
        self.least = least
        self.hope = hope
        # By layers ahead and place in the list: guesses that were needed, and all.
        self._right: defaultdict[tuple[int, int], float] = defaultdict(float)
        self._made: defaultdict[tuple[int, int], float] = defaultdict(float)
        self._open: dict[int, list[tuple[int, list[int]]]] = {}

    def begin(self) -> None:
        self._open.clear()

    def guess(self, sight: Sight) -> Sequence[Key]:
        self._settle(sight)
        found: list[tuple[float, int, int, Key]] = []
        for ahead in range(1, self.distance + 1):
            later = sight.layer + ahead
            shares = sight.gates(later) if later < len(sight.num_experts) else None
            if shares is None:
                continue
            best = sorted(range(len(shares)), key=lambda expert: (-shares[expert], expert))
            best = best[: len(sight.experts)]
            self._open.setdefault(later, []).append((ahead, best))
            for place, expert in enumerate(best):
                chance = self._chance(ahead, place)
                if chance >= self.least:
                    found.append((-chance, ahead, place, Key(later, expert)))
        return list(dict.fromkeys(key for *_, key in sorted(found)))

    def _settle(self, sight: Sight) -> None:
        """Count which guesses for this layer were right."""
        needed = set(sight.experts)
        for ahead, best in self._open.pop(sight.layer, []):
            for place, expert in enumerate(best):
                self._made[ahead, place] += 1
                self._right[ahead, place] += expert in needed

    def _chance(self, ahead: int, place: int) -> float:
        """As counted, beginning with what is hoped for as if it had been seen four times."""
        return (self._right[ahead, place] + 4 * self.hope) / (self._made[ahead, place] + 4)
