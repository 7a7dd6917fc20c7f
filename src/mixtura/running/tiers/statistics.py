"""What happened to experts while a model ran from memory and disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final


@final
@dataclass(slots=True)
class LayerCounts:
    """Of one layer: experts that were needed, and those of them that were in memory."""

    needed: int = 0
    hits: int = 0


@final
@dataclass(slots=True, kw_only=True)
class Statistics:
    """Sums since a model was loaded, or since `Tiers.forget_statistics`.

    Attributes:
        needed: experts that calls of layers needed, each counted once a call.
        hits: those of them that were in memory, or on their way because of an earlier guess.
        demanded_bytes: read because a layer needed them and they were not there.
        prefetched_bytes: read because a prefetcher guessed them.
        used_bytes: those of them that were needed before they had to go.
        wasted_bytes: those that had to go unused.
        waited_ms: time that layers stood still for reads.
        layers: counts by decoder layer.
    """

    needed: int = 0
    hits: int = 0
    demanded_bytes: int = 0
    prefetched_bytes: int = 0
    used_bytes: int = 0
    wasted_bytes: int = 0
    waited_ms: float = 0.0
    layers: dict[int, LayerCounts] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        """Share of needed experts that were in memory; 0 where none was needed."""
        return self.hits / self.needed if self.needed else 0.0

    def count(self, layer: int, hit: bool) -> None:
        """An expert of a layer was needed."""
        self.needed += 1
        self.hits += hit
        counts = self.layers.setdefault(layer, LayerCounts())
        counts.needed += 1
        counts.hits += hit

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "needed": self.needed,
            "hits": self.hits,
            "hit_rate": self.hit_rate,
            "demanded_bytes": self.demanded_bytes,
            "prefetched_bytes": self.prefetched_bytes,
            "used_bytes": self.used_bytes,
            "wasted_bytes": self.wasted_bytes,
            "waited_ms": self.waited_ms,
            "layers": {str(n): {"needed": c.needed, "hits": c.hits} for n, c in sorted(self.layers.items())},
        }
