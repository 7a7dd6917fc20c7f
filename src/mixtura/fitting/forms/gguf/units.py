"""What gets a type of its own in a GGUF file: tensors, and the types there are for each."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from mixtura.checkpoints.gguf.tensors import FileTensor
from mixtura.checkpoints.gguf.types import NEED_IMPORTANCE
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.errors import UnsupportedModelError
from mixtura.fitting.palette import Palette
from mixtura.fitting.records import Parts

# From most bits to fewest. What fewer than two bits leave is no model, and llama.cpp says so of them, too.
TYPES = (
    "q8_0", "q6_k", "q5_1", "q5_k", "q5_0", "q4_1", "q4_k", "q4_0", "iq4_nl", "iq4_xs", "q3_k", "iq3_s",
    "iq3_xxs", "q2_k", "iq2_s", "iq2_xs", "iq2_xxs",
)  # fmt: skip
PALETTE = Palette(("keep", *TYPES))
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
# Embeddings come before every layer, and the head after all.
_FIRST, _LAST = -1, 1 << 20


@final
@dataclass(frozen=True, slots=True)
class Unit:
    """Tensors that have one type: a single one, or all that are made of the same numbers.

    Attributes:
        tensors: as they are without a choice.
        stored: the tensor on disk that they are of; None for experts.
    """

    tensors: tuple[FileTensor, ...]
    stored: str | None

    @property
    def name(self) -> str:
        """llama.cpp's name."""
        return self.tensors[0].name.removesuffix(".weight")

    @property
    def layer(self) -> int:
        """The decoder layer; before and after all of them for embeddings and head."""
        match = _LAYER.match(self.name)
        if match is not None:
            return int(match[1])
        return _FIRST if self.name.startswith("token_embd") else _LAST

    @property
    def kind(self) -> str:
        """Its name without the layer."""
        match = _LAYER.match(self.name)
        return self.name if match is None else match[2]

    @property
    def is_experts(self) -> bool:
        """Whether it holds a matrix of every routed expert of its layer."""
        return self.stored is None

    def at(self, option: int) -> tuple[FileTensor, ...]:
        """The tensors under an option of `PALETTE`."""
        if option == PALETTE.keep:
            return self.tensors
        return tuple(tensor.stored_as(PALETTE.names[option]) for tensor in self.tensors)

    def num_bytes(self, option: int) -> int:
        """What they take in the file, without what aligns the next."""
        return sum(tensor.num_bytes for tensor in self.at(option))

    def allows(self, option: int) -> bool:
        """Whether it can be had: some types are made only with what text says of a matrix's inputs."""
        return all(
            tensor.kind.name not in NEED_IMPORTANCE or all(piece.inputs for piece in tensor.pieces)
            for tensor in self.at(option)
        )


def units_of(view: CheckpointView, tensors: Sequence[FileTensor]) -> tuple[Unit, ...]:
    """The units of a file, in its order.

    Raises:
        UnsupportedModelError: a matrix lies on disk in a form in which it cannot be tried in fewer bits.
    """
    found: dict[str, list[FileTensor]] = {}
    stored: dict[str, str | None] = {}
    for tensor in tensors:
        if not tensor.may_be_rounded:
            continue
        piece = tensor.pieces[0]
        key = tensor.name
        stored[key] = None if piece.expert is not None else _stored(view, piece.parameter)
        same = next((k for k, s in stored.items() if s is not None and s == stored[key]), key)
        # A head that is the embedding has its type; two parts of one matrix are apart.
        whole = stored[key]
        if whole is not None and math.prod(tensor.shape) == math.prod(view.entries[whole].shape):
            key = same
        found.setdefault(key, []).append(tensor)
    return tuple(Unit(tuple(group), stored[key]) for key, group in found.items())


def _stored(view: CheckpointView, parameter: str) -> str:
    source = view.sources[parameter]
    if len(source.names) != 1 or source.converter is not None or source.names[0] in view.matrices:
        raise UnsupportedModelError(
            f"{parameter} is stored in a way in which a fit cannot try it in fewer bits; `mixtura export "
            f"--format gguf --type ...` writes a file in types that you name"
        )
    return source.names[0]


def parts_of(units: Sequence[Unit]) -> Parts:
    """The units as what a search chooses for."""
    return Parts(np.array([unit.layer for unit in units]), np.arange(len(units)))


def sizes_of(units: Sequence[Unit]) -> Int[ndarray, "M O"]:
    """Bytes of each unit under each option."""
    options = range(len(PALETTE.names))
    return np.array([[unit.num_bytes(option) for option in options] for unit in units], dtype=np.int64)


def least_bytes(units: Sequence[Unit], options: Sequence[int] = PALETTE.stored) -> int:
    """What the units take in the smallest types that each can have."""
    return sum(min(unit.num_bytes(option) for option in options if unit.allows(option)) for unit in units)


def blocks_of(units: Sequence[Unit], most: int) -> tuple[Bool[ndarray, " M"], ...]:
    """Units whose errors are taken to cost the same: of one kind, in neighbouring layers.

    Args:
        units: all of them.
        most: blocks at most, but for one of every kind.
    """
    kinds = list(dict.fromkeys(unit.kind for unit in units))
    counts = Counter(unit.kind for unit in units)
    share = max(1, most // len(kinds))
    names = np.array([unit.kind for unit in units])
    masks = []
    for kind in kinds:
        places = np.flatnonzero(names == kind)
        for part in np.array_split(places, min(share, counts[kind])):
            mask = np.zeros(len(units), dtype=bool)
            mask[part] = True
            masks.append(mask)
    return tuple(masks)


def choice_map_of(units: Sequence[Unit], types: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """By decoder layer, and for what is before and after them, the type of each kind of tensor; "" for none.

    Args:
        units: all of them.
        types: the type of each unit by name.
    """
    kinds = list(dict.fromkeys(unit.kind for unit in units))
    rows: dict[str, dict[str, str]] = {}
    for unit in sorted(units, key=lambda unit: unit.layer):
        row = str(unit.layer) if _FIRST < unit.layer < _LAST else unit.name
        rows.setdefault(row, {})[unit.kind] = types[unit.name]
    return {row: tuple(found.get(kind, "") for kind in kinds) for row, found in rows.items()}
