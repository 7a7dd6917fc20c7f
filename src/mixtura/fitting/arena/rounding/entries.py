"""Who takes part at which size: every quantizer with the settings that use the room best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from mixtura.errors import UnknownNameError, UserError
from mixtura.methods import create, header, names
from mixtura.methods.quantizers import Quantizer

KIND = "quantizers"
REFERENCE = "round_to_nearest"
# Bits of a weight at most, scales included.
RUNGS: Final = (2.25, 4.25)
_BITS = (8, 7, 6, 5, 4, 3.5, 3, 2.5, 2, 1.5, 1)
_GROUPS = (16, 32, 64, 128, 256)

# Rows and columns of the matrices to be stored.
Sizes = Sequence[tuple[int, int]]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A quantizer as it takes part at one size.

    Attributes:
        name: of the quantizer.
        settings: what differs from its defaults.
        rung: bits of a weight that it may take.
        bits: that it does take.
    """

    name: str
    settings: Mapping[str, Any]
    rung: float
    bits: float

    @property
    def baseline(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.name == REFERENCE

    @property
    def said(self) -> str:
        """Its settings in words."""
        return ", ".join(f"{name} {value}" for name, value in self.settings.items()) or "its defaults"

    def quantizer(self) -> Quantizer:
        """The method, ready to be used."""
        made: Quantizer = create(KIND, self.name, **self.settings)
        return made


def entries(only: Sequence[str], sizes: Sizes, rungs: Sequence[float] = RUNGS) -> tuple[Entry, ...]:
    """All that fit, by size and name; with ``only``, the named ones and the baseline.

    Of a quantizer with settings ``bits`` and ``group_size`` those are taken that have most bits and, of
    these, the smallest groups for which there is room. Who has nothing so small stays out of that size, and
    a size for which the baseline has nothing is left out.

    Raises:
        UnknownNameError: a name is no quantizer.
        UserError: no size is left: the matrices are so narrow that scales take much of the room.
    """
    known = names(KIND)
    for name in only:
        if name not in known:
            raise UnknownNameError("quantizer in the arena", name, known)
    wanted = [name for name in known if not only or name in {*only, REFERENCE}]
    found: list[Entry] = []
    for rung in rungs:
        here = [entry for name in wanted if (entry := _best(name, rung, sizes)) is not None]
        found += here if any(entry.baseline for entry in here) else []
    if not found:
        raise UserError(
            f"{REFERENCE} has nothing of {max(rungs):g} bits or less for experts of "
            f"{min(cols for _, cols in sizes)} columns; give a model of wider experts"
        )
    return tuple(found)


def _best(name: str, rung: float, sizes: Sizes) -> Entry | None:
    for settings in _settings(name):
        try:
            quantizer = create(KIND, name, **settings)
        except UserError:
            continue
        bits = _bits_per_weight(quantizer, sizes)
        if bits <= rung:
            return Entry(name=name, settings=settings, rung=rung, bits=bits)
    return None


def _settings(name: str) -> Iterator[dict[str, Any]]:
    """Settings in the order in which they are preferred."""
    own = {setting.name for setting in header(KIND, name).settings}
    for bits in _BITS if "bits" in own else (None,):
        for group in _GROUPS if "group_size" in own else (None,):
            given = {"bits": bits, "group_size": group}
            yield {key: value for key, value in given.items() if value is not None}


def _bits_per_weight(quantizer: Quantizer, sizes: Sizes) -> float:
    taken = sum(quantizer.num_bytes(rows, cols) for rows, cols in sizes)
    return 8 * taken / sum(rows * cols for rows, cols in sizes)
