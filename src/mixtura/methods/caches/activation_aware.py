"""What the text at hand has needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import final

from mixtura.methods.caches import Cache, Call, Key
from mixtura.methods.caches._shared import ByLayer

METHOD = {"paper": None, "title": "Activations of the text at hand"}


@final
class ActivationAware(Cache):
    """Let go the expert that the text at hand has given the smallest share of its layer's tokens.

    A text stays with some experts of each layer, and another text with others. So shares are counted anew for
    each text, as the tokens that went to an expert over those of its layer. Of equal shares, the least recent
    leaves.

    Shapes:
        One expert of one layer at a time.

    Raises:
        SettingError: ``capacity`` is less than 1.

    Example:
        >>> cache = ActivationAware(2)
        >>> cache.see(Call(0, (1, 2), (1, 5)))
        >>> [cache.touch(0, expert).evicted for expert in (1, 2, 1, 3)][-1]
        Key(layer=0, expert=1)
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._rows: Counter[Key] = Counter()
        self._totals: Counter[int] = Counter()
        self._inside = ByLayer(self._share)

    def begin(self) -> None:
        self._rows.clear()
        self._totals.clear()
        self._inside.stir()

    def see(self, call: Call) -> None:
        for expert, rows in zip(call.experts, call.num_rows, strict=True):
            self._rows[Key(call.layer, expert)] += rows
        self._totals[call.layer] += sum(call.num_rows)
        self._inside.stir(call.layer)

    def note(self, key: Key, hit: bool) -> None:
        self._inside.use(key)

    def victim(self, key: Key, held: Collection[Key]) -> Key:
        return self._inside.pop(held)

    def _share(self, key: Key) -> float:
        return self._rows[key] / (self._totals[key.layer] or 1)
