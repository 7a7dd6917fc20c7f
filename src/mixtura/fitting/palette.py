"""What can be done to a part of a model; to an expert: leave it, store it in fewer bits, or drop it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, final

from mixtura.methods import create
from mixtura.methods.quantizers import Quantizer
from mixtura.types import Quantize


@final
@dataclass(frozen=True, slots=True)
class Palette:
    """What the parts of a model can be stored as, by number. The letter O counts these options.

    Attributes:
        names: as tables show them, from most bytes to fewest.
        keep: the option that leaves a part as it is.
        drop: the option that leaves it out; None where no part can be.
    """

    names: tuple[str, ...]
    keep: int = 0
    drop: int | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """Options that store a part in fewer bits."""
        return tuple(option for option in range(len(self.names)) if option not in (self.keep, self.drop))


@final
@dataclass(frozen=True, slots=True)
class Way:
    """A way of storing an expert in fewer bits.

    Attributes:
        name: as tables show it.
        bits: of a weight, without scales.
        quantizer: what stores its matrices.
        settings: of the quantizer.
    """

    name: str
    bits: float
    quantizer: str
    settings: Mapping[str, Any]

    def action(self, layer: int, expert: int) -> Quantize:
        """Storing one expert so, as part of a plan."""
        return Quantize(layer, expert, self.quantizer, dict(self.settings))


def _trellis(bits: float) -> Way:
    return Way(f"{bits:g} bit", bits, "trellis", {"bits": bits})


WAYS = (
    Way("8 bit", 8, "round_to_nearest", {"bits": 8}),
    _trellis(5),
    _trellis(4),
    _trellis(3),
    _trellis(2),
)
OPTIONS = ("keep", *(way.name for way in WAYS), "drop")
KEEP, DROP = 0, len(OPTIONS) - 1
SMALLEST = DROP - 1
EXPERTS = Palette(OPTIONS, KEEP, DROP)
# By option.
STORED = {1 + number: way for number, way in enumerate(WAYS)}


def option_of(action: Quantize) -> int:
    """The option that an action is."""
    return next(
        option
        for option, way in STORED.items()
        if (way.quantizer, dict(way.settings)) == (action.quantizer, action.settings)
    )


@cache
def quantizer_of(option: int) -> Quantizer:
    """What stores matrices under an option."""
    way = STORED[option]
    made = create("quantizers", way.quantizer, **way.settings)
    assert isinstance(made, Quantizer)
    return made
