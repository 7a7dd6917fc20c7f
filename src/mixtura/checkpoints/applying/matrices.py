"""Units that write a matrix outside the experts in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mixtura.checkpoints.applying.shards import OutputTensor, Sink, Unit
from mixtura.checkpoints.matrices import encoded, form_of, packable_matrices
from mixtura.checkpoints.packed import MatrixRecord, matrix_part, quantizer_of
from mixtura.checkpoints.skeleton import build
from mixtura.checkpoints.viewing.disk import DiskView
from mixtura.errors import CheckpointError, UserError, suggest
from mixtura.types import Plan


@final
@dataclass(frozen=True, eq=False)
class PackMatrix(Unit):
    """Writes the parts of one matrix."""

    view: DiskView
    name: str
    record: MatrixRecord
    outputs: tuple[OutputTensor, ...]

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """One for each part."""
        return self.outputs

    def write(self, sink: Sink) -> None:
        """Read the matrix, round it, write its parts."""
        weight: Tensor = self.view.tensor(self.name)
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"{self.name} holds NaN or infinite values, so the source is damaged; "
                f"download or write it again"
            )
        for part, tensor in encoded(weight, quantizer_of(self.record)).items():
            sink.write(matrix_part(self.name, part), tensor)


def matrix_units(view: DiskView, plan: Plan) -> tuple[dict[str, Sequence[Unit]], dict[str, MatrixRecord]]:
    """What is written in the place of matrices that a plan stores in fewer bits, and their records.

    Raises:
        UserError: the plan names what is not such a matrix, or a quantizer that cannot read rows alone.
    """
    actions = plan.matrices()
    if not actions:
        return {}, {}
    model = build(view)
    matrices = packable_matrices(model, view)
    units: dict[str, Sequence[Unit]] = {}
    records = {}
    for name, action in actions.items():
        if name not in matrices:
            raise UserError(
                f"the plan stores {name!r} in fewer bits, and there is no such matrix outside the experts "
                f"that may be; {suggest(name, matrices)}"
            )
        (rows, cols, _), dtype = matrices[name], view.entries[name].dtype
        records[name], forms = form_of(rows, cols, dtype, action.quantizer, action.settings)
        outputs = (OutputTensor(matrix_part(name, part), *form) for part, form in forms.items())
        units[name] = (PackMatrix(view, name, records[name], tuple(outputs)),)
    return units, records
