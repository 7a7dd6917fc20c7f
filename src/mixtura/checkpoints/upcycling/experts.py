"""The matrices of one expert, made of one or several dense models' feed-forward parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.checkpoints.applying.copying import damaged, read_range
from mixtura.checkpoints.dense.view import DOWN, GATE, KEY, QUERY, UP, DenseView, Piece
from mixtura.methods._parts import part_of
from mixtura.types.upcycling import Approach, Build, Fill

# What actions call a matrix of a layer, and what it is called there.
MATRICES: Mapping[str, str] = {"gate": GATE, "up": UP, "query": QUERY, "key": KEY}


class Matrices(NamedTuple):
    """Gate and up ``[F, D]`` and down ``[D, F]`` of an expert."""

    gate: Float[Tensor, "F D"]
    up: Float[Tensor, "F D"]
    down: Float[Tensor, "D F"]


@final
@dataclass(frozen=True, slots=True)
class Workshop:
    """Makes experts of sources, one at a time; ``arrays`` are what actions name."""

    sources: Sequence[DenseView]
    arrays: Mapping[str, Tensor]
    dtype: torch.dtype

    def make(self, action: Build | Approach, down_scale: float = 1.0) -> Matrices:
        """The expert that an action describes, in the result's dtype.

        Raises:
            CheckpointError: a source holds NaN or infinity there.
        """
        found = self._built(action) if isinstance(action, Build) else self._approached(action)
        scale = down_scale * (action.scale if isinstance(action, Build) else 1.0)
        down = found.down if scale == 1.0 else found.down.float() * scale
        made = Matrices(found.gate.to(self.dtype), found.up.to(self.dtype), down.to(self.dtype))
        for name, matrix in zip((GATE, UP, DOWN), made, strict=True):
            if not bool(torch.isfinite(matrix).all()):
                raise damaged(name, action.layer, action.expert, "expert that every token visits")
        return made

    def width(self, action: Build | Approach) -> int:
        """F of the expert."""
        view = self.sources[action.source]
        if isinstance(action, Approach) or action.neurons is None:
            return view.shape.d_ffn
        if isinstance(action.neurons, str):
            return len(self.arrays[action.neurons])
        return action.neurons[1] - action.neurons[0]

    def filled(self, action: Fill) -> Tensor:
        """The parameter of a router that an action makes.

        Raises:
            UserError: the matrix has too few rows.
        """
        if action.matrix is None:
            return action.made(None, self.arrays)
        piece = self.sources[action.source].layer_piece(action.layer, MATRICES[action.matrix])
        return action.made(read_piece(piece), self.arrays)

    def _built(self, action: Build) -> Matrices:
        view, layer = self.sources[action.source], action.layer
        gate, up, down = (view.layer_piece(layer, name) for name in (GATE, UP, DOWN))
        if isinstance(action.neurons, str):
            ids = self.arrays[action.neurons].long()
            chosen = Matrices(read_piece(gate)[ids], read_piece(up)[ids], read_piece(down)[:, ids])
        else:
            start, stop = action.neurons or (0, view.shape.d_ffn)
            rows = [read_piece(part, start, stop) for part in (gate, up)]
            chosen = Matrices(rows[0], rows[1], read_piece(down)[:, start:stop])
        return _redrawn(chosen, action) if action.redrawn else chosen

    def _approached(self, action: Approach) -> Matrices:
        base, wanted = self._read(action.base, action.layer), self._read(action.source, action.layer)
        return Matrices(*(_towards(a, b, action.rank) for a, b in zip(base, wanted, strict=True)))

    def _read(self, source: int, layer: int) -> Matrices:
        view = self.sources[source]
        return Matrices(*(read_piece(view.layer_piece(layer, name)) for name in (GATE, UP, DOWN)))


def read_piece(piece: Piece, start: int = 0, stop: int | None = None) -> Tensor:
    """Some rows of a piece, as they are stored, its shift added."""
    first, last = piece.rows[0] + start, piece.rows[1] if stop is None else piece.rows[0] + stop
    row_bytes = piece.entry.num_bytes // max(piece.entry.shape[0], 1)
    raw = read_range(piece.entry, first * row_bytes, (last - first) * row_bytes)
    values = raw.view(piece.entry.dtype).view(last - first, *piece.entry.shape[1:])
    return values if not piece.shift else values.float() + piece.shift


def _redrawn(matrices: Matrices, action: Build) -> Matrices:
    """The matrices with a share of their neurons drawn anew, as each matrix's own are distributed."""
    width = matrices.gate.shape[0]
    expert = -1 if action.expert is None else action.expert
    seed = (action.seed * 1_000_003 + action.layer) * 1_000_003 + expert + 1
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    ids = torch.randperm(width, generator=generator)[: part_of(action.redrawn, width)].sort().values
    made = []
    for matrix, axis in zip(matrices, (0, 0, 1), strict=True):
        changed = matrix.clone()
        old = matrix.index_select(axis, ids).float()
        if old.numel():
            drawn = torch.randn(old.shape, generator=generator) * old.std(correction=0) + old.mean()
            changed.index_copy_(axis, ids, drawn.to(matrix.dtype))
        made.append(changed)
    return Matrices(*made)


def _towards(base: Tensor, wanted: Tensor, rank: int) -> Tensor:
    """A base and the first terms of the singular value decomposition of what it lacks."""
    if rank >= min(base.shape):
        return wanted
    left, values, right = torch.linalg.svd(wanted.float() - base.float(), full_matrices=False)
    change: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
    return base.float() + change
