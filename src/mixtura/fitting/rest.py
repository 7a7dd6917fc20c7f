"""What is outside the routed experts, attention, dense layers, embeddings and head, in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from mixtura.checkpoints.matrices import form_of, pack_skeleton, packable_matrices, rounded
from mixtura.checkpoints.skeleton import CheckpointView, build
from mixtura.fitting.palette import STORED, quantizer_of
from mixtura.running.memory import MemoryAccount, account
from mixtura.types import QuantizeMatrix

# Rows stand alone in 8 bits, with a scale each.
_OPTION = 1
_WAY = STORED[_OPTION]
NAME = _WAY.name


@final
@dataclass(frozen=True, slots=True)
class Rest:
    """Matrices outside the routed experts, and what it saves to store them all in 8 bits.

    Attributes:
        names: of the tensors on disk.
        saved_bytes: of the account of the model.
        saved_active_bytes: of those that a token reads.
    """

    names: tuple[str, ...] = ()
    saved_bytes: int = 0
    saved_active_bytes: float = 0.0

    @property
    def actions(self) -> tuple[QuantizeMatrix, ...]:
        """Storing them so, as part of a plan."""
        return tuple(QuantizeMatrix(name, _WAY.quantizer, dict(_WAY.settings)) for name in self.names)

    def changed(self, name: str, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """A tensor as it is after that; the same one where it is not among them."""
        return rounded(weight, quantizer_of(_OPTION)) if name in self.names else weight


def rest_of(view: CheckpointView, context: int, kept: MemoryAccount) -> Rest:
    """What is outside the routed experts of a checkpoint.

    Args:
        view: the checkpoint.
        context: tokens that the cache holds.
        kept: the account with the rest as it is, and experts in fewer bits.
    """
    model = build(view)
    records, forms, active = {}, {}, 0.0
    for name, matrix in packable_matrices(model, view).items():
        entry = view.entries[name]
        record, form = form_of(matrix.rows, matrix.cols, entry.dtype, _WAY.quantizer, _WAY.settings)
        records[name], forms[name] = record, form
        if not matrix.is_looked_up:
            active += entry.num_bytes - quantizer_of(_OPTION).num_bytes(matrix.rows, matrix.cols)
    if not records:
        return Rest()
    pack_skeleton(model, view, records, forms)
    saved = kept.total_bytes - account(view, context, as_packed=True, skeleton=model).total_bytes
    return Rest(tuple(records), saved, active) if saved > 0 else Rest()
