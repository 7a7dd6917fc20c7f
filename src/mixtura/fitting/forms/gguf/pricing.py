"""What each type of each tensor would cost: errors of its products with what calibration text gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from mixtura.checkpoints.gguf.tensors import FileTensor, Piece
from mixtura.fitting.forms.gguf.codes import Codes
from mixtura.fitting.forms.gguf.units import PALETTE, Unit

# Weights of a tensor that are rounded to price it: rows of it stand alone, and so do experts.
SAMPLED_WEIGHTS = 1 << 16
_SAMPLED_PIECES = 16

Sample = Sequence[tuple[Piece, Tensor, float]]


def errors_of(
    units: Sequence[Unit],
    options: Sequence[int],
    codes: Codes,
    rows: Mapping[str, int],
    advance: Callable[[], None],
) -> Float[ndarray, "M O"]:
    """Error of each option of each unit, as a share of its products' squares; infinity where not tried.

    Args:
        units: what gets types.
        options: which of `PALETTE` are tried.
        codes: rounds.
        rows: rows that a matrix is given by the name of its inputs: so much its errors count.
        advance: called after each unit; what it raises stops the work.
    """
    found = np.full((len(units), len(PALETTE.names)), np.inf)
    found[:, PALETTE.keep] = 0.0
    for place, unit in enumerate(units):
        known: dict[tuple[str, ...], float] = {}
        samples = [sampled(tensor, rows) for tensor in unit.tensors]
        whole = sum(codes.size(sample) for sample in samples)
        for option in options:
            tensors = unit.at(option)
            kinds = tuple(tensor.kind.name for tensor in tensors)
            if not unit.allows(option):
                continue
            if kinds not in known:
                pairs = zip(tensors, samples, strict=True)
                known[kinds] = sum(codes.error(tensor, sample) for tensor, sample in pairs)
            found[place, option] = known[kinds] / max(whole, 1e-30)
        advance()
    return found


def sampled(tensor: FileTensor, rows: Mapping[str, int]) -> Sample:
    """Some rows of some pieces of a tensor, spread evenly, and by how much their errors count."""
    count = min(len(tensor.pieces), _SAMPLED_PIECES)
    places = np.unique(np.linspace(0, len(tensor.pieces) - 1, count).round().astype(int))
    made = []
    for place in places:
        piece = tensor.pieces[place]
        matrix = piece.read().reshape(-1, tensor.shape[-1])
        most = max(1, SAMPLED_WEIGHTS // len(places) // matrix.shape[1])
        step = max(1, matrix.shape[0] // most)
        taken = matrix[::step].float().contiguous()
        made.append((piece, taken, float(rows.get(piece.inputs or "", 0) + 1)))
    return made


def kept_in(found: Mapping[str, Tensor], rows: Mapping[str, int]) -> dict[str, Tensor]:
    """Importance and rows as tensors of one file."""
    counted = {f"rows:{name}": torch.tensor([count]) for name, count in rows.items()}
    return {**{f"squares:{name}": value.contiguous() for name, value in found.items()}, **counted}


def kept_from(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What `kept_in` was given."""
    squares = {name[8:]: value for name, value in tensors.items() if name.startswith("squares:")}
    rows = {name[5:]: int(value[0]) for name, value in tensors.items() if name.startswith("rows:")}
    return squares, rows
