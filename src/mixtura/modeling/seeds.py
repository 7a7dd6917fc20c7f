"""The seeds of a model's parts, all from the model's own, so that no two parts draw the same numbers."""

from __future__ import annotations

_PARTS = {"router": 1, "experts": 2, "shared": 3, "balancer": 4}
_STRIDE = 1_000_003
# Between the passes of one layer, and to what a layer has one of.
_TURN_STRIDE = 15_485_863
FORM, ATTENTION = "form", "attention"


def part_seed(seed: int, layer: int, part: str, turn: int = 0) -> int:
    """The seed of one part of one pass of one layer, from the model's."""
    if part == FORM:
        part, turn = "balancer", turn + 1
    elif part == ATTENTION:
        part, turn = "balancer", -1
    return (seed * _STRIDE + layer * len(_PARTS) + _PARTS[part] + turn * _TURN_STRIDE) % (1 << 31)
