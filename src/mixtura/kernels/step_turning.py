"""Tables of cosines and sines for the next token, as a decoder's own rotary embedding makes them."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor, nn

from mixtura.kernels.declined import Declined
from mixtura.kernels.step_calls import Tables, Turns, turns_of

# Rotations whose tables depend on nothing but the place, and the places that one block of tables has.
_FIXED_ROTATIONS: Final = {"default", "linear", "llama3", "yarn"}
_BLOCK: Final = 256
# Blocks that are kept of each kind.
_MOST_BLOCKS: Final = 16


class Turned(NamedTuple):
    """Tables for the extension, and what must stay as long as it reads them."""

    turns: Turns
    holds: Tables


@final
class Turning:
    """A rotary embedding, and the block of places whose tables were made last.

    What was made stays as it is: whoever keeps this watches the embedding and its frequencies.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        # Given the tokens and their places, and in some families which kind of layer asks.
        self.takes_kinds = len(inspect.signature(type(rotary).forward).parameters) > 3
        self._blocks: dict[tuple[str | None, int], Tables] = {}

    def at(self, x: Tensor, places: Sequence[int], kinds: Collection[str | None]) -> dict[str | None, Turned]:
        """The tables at a place, or at that of each sequence, for each kind of layer.

        None is the kind where all layers share them.

        Raises:
            Declined: the embedding gives no two tables in the dtype of ``x``.
        """
        found = {}
        for kind in kinds:
            rows = [self._tables(x, place, kind) for place in places]
            if len(rows) == 1:
                tables, row = rows[0]
            else:
                parts = [Tables(t.cosines[:, r : r + 1], t.sines[:, r : r + 1]) for t, r in rows]
                tables, row = Tables(*(torch.cat([*part]) for part in zip(*parts, strict=True))), 0
            found[kind] = Turned(turns_of(tables, row), tables)
        return found

    def _tables(self, x: Tensor, place: int, kind: str | None) -> tuple[Tables, int]:
        """Cosines and sines of a place, or of a block where they depend on it alone; and its row in them."""
        types = getattr(self._rotary, "rope_type", None)
        fixed = (types.get(kind) if isinstance(types, dict) else types) in _FIXED_ROTATIONS
        first = place // _BLOCK * _BLOCK if fixed else place
        tables = self._blocks.get((kind, first)) if fixed else None
        if tables is None:
            tables = self._made(x, torch.arange(first, first + (_BLOCK if fixed else 1))[None], kind)
            # The last few blocks of each kind: several texts stand at several places.
            others = [key for key in self._blocks if key[0] == kind]
            for key in others[: max(0, len(others) + 1 - _MOST_BLOCKS)]:
                del self._blocks[key]
            self._blocks[(kind, first)] = tables
        return tables, place - first

    def _made(self, x: Tensor, places: Tensor, kind: str | None) -> Tables:
        made: Any = self._rotary(x, places, *(() if kind is None else (kind,)))
        if (
            not isinstance(made, tuple)
            or len(made) != 2
            or made[0].ndim != 3
            or made[0].stride() != made[1].stride()
            or made[0].dtype != x.dtype
        ):
            raise Declined("its rotary embedding gives other things than a table of cosines and one of sines")
        return Tables(*made)
