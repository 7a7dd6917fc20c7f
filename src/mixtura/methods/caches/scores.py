"""Recent router scores."""

from __future__ import annotations

from collections.abc import Collection
from typing import final

from mixtura.errors import check_range
from mixtura.methods.caches import Cache, Call, Key
from mixtura.methods.caches._shared import ByLayer

METHOD = {
    "paper": 159,
    "title": "HybriMoE: Hybrid CPU-GPU Scheduling and Cache Management for Efficient MoE Inference",
    "tags": ["reads:scores"],
}


@final
class Scores(Cache):
    """Let go the expert that routers have liked least of late.

    A router gives every expert a share, and one that was nearly chosen is likelier to be needed soon than one
    that was needed long ago. With each call of a layer, the priority of its experts moves towards their
    shares, those of the ``top`` best only: ``alpha * share + (1 - alpha) * priority``. The least priority
    leaves, of equal ones the least recent.

    Shapes:
        One expert of one layer at a time; one share for each expert of a layer at each call.

    Raises:
        SettingError: ``capacity`` or ``top`` is less than 1, or ``alpha`` not in [0, 1].

    Example:
        >>> cache = Scores(2)
        >>> cache.see(Call(0, (1, 2), (1, 1), scores=(0.1, 0.2, 0.7)))
        >>> [cache.touch(0, expert).evicted for expert in (1, 2, 0)][-1]
        Key(layer=0, expert=1)

    Differences from the paper:
        The rule and its defaults (``alpha`` 0.5, ``top`` 12) are those of the authors' code. Shares come from
        the router's matrix and a softmax over all experts, averaged over the tokens of a call, whatever the
        family's own scoring; where they cannot be had, needed experts get their share of the tokens.
        Priorities are compared over all layers, and the schedule for a GPU is not here.

    Reference:
        HybriMoE: Hybrid CPU-GPU Scheduling and Cache Management for Efficient MoE Inference (paper 159).
    """

    def __init__(self, capacity: int, *, alpha: float = 0.5, top: int = 12) -> None:
        super().__init__(capacity)
        check_range("Scores", "alpha", alpha, 0.0, 1.0)
        check_range("Scores", "top", top, 1, 1 << 20)
        self.alpha = alpha
        self.top = top
        self._priorities: dict[int, dict[int, float]] = {}
        self._inside = ByLayer(self._priority)

    def see(self, call: Call) -> None:
        if call.scores is None:
            total = sum(call.num_rows) or 1
            shares = {e: rows / total for e, rows in zip(call.experts, call.num_rows, strict=True)}
        else:
            shares = dict(enumerate(call.scores))
        best = sorted(shares, key=lambda expert: (-shares[expert], expert))[: self.top]
        old = self._priorities.get(call.layer, {})
        new = {expert: (1 - self.alpha) * priority for expert, priority in old.items()}
        for expert in best:
            new[expert] = new.get(expert, 0.0) + self.alpha * shares[expert]
        self._priorities[call.layer] = new
        self._inside.stir(call.layer)

    def note(self, key: Key, hit: bool) -> None:
        self._inside.use(key)

    def victim(self, key: Key, held: Collection[Key]) -> Key:
        return self._inside.pop(held)

    def _priority(self, key: Key) -> float:
        return self._priorities.get(key.layer, {}).get(key.expert, 0.0)
