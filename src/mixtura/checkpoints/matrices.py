"""Matrices outside the routed experts in fewer bits: which may be, what they take, what reads them.

Attention, dense layers, shared experts, embeddings and the head are most of what is left of a model once its
experts are small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.checkpoints.packed import MatrixRecord, matrix_part, quantizer_of
from mixtura.checkpoints.slots import Slot, slots
from mixtura.checkpoints.viewing.stored import StoredView
from mixtura.kernels import PackedEmbedding, PackedLinear, packable_modules
from mixtura.kernels.linears import bits_of_levels
from mixtura.methods.quantizers import Quantizer

# Rows that are rounded at a time, so that little of a large matrix is in float32.
_ROUNDED_WEIGHTS = 4 << 20


Form = tuple[torch.dtype, tuple[int, ...]]


@final
class Matrix(NamedTuple):
    """A matrix outside the experts.

    Attributes:
        rows: output features, or tokens.
        cols: input features.
        is_looked_up: whether it is a table of embeddings and nothing else, of which a token reads one row.
    """

    rows: int
    cols: int
    is_looked_up: bool


def packable_matrices(model: nn.Module, view: StoredView) -> dict[str, Matrix]:
    """Matrices outside the experts that may be stored in fewer bits, by the names on disk.

    They are weights of linear layers and tables of embeddings which nothing reads but these modules, stored
    as plain numbers under one name. Routers are not among them: they are small, and decide everything.

    Args:
        model: built from the checkpoint, without weights.
        view: the checkpoint.
    """
    held = {id(one.module) for one in packable_modules(model)}
    found = {}
    for slot in slots(model):
        name = stored_name(slot, view)
        if name is None or not all(id(module) in held and part == "weight" for module, part in slot.holders):
            continue
        stored = view.stored[name]
        dtype = getattr(torch, stored.kind, None)
        plain = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        if plain and stored.shape == tuple(slot.empty.shape):
            looked_up = all(isinstance(module, nn.Embedding) for module, _ in slot.holders)
            rows, cols = stored.shape
            found[name] = Matrix(rows, cols, looked_up)
    return found


def stored_name(slot: Slot, view: StoredView) -> str | None:
    """The one tensor on disk that a parameter is, as it is; None where it is made of others."""
    sources = [view.sources[name] for name in slot.names if name in view.sources]
    if len({source.names for source in sources}) != 1:
        return None
    source = sources[0]
    return source.names[0] if len(source.names) == 1 and source.converter is None else None


def rounded(weight: Float[Tensor, "R C"], quantizer: Quantizer) -> Float[Tensor, "R C"]:
    """A matrix as it is after rounding by a quantizer whose rows stand alone, in its own dtype."""
    return torch.cat(
        [quantizer.decode(quantizer.encode(rows), weight.dtype) for rows in weight.split(_rows(weight))]
    )


def encoded(weight: Float[Tensor, "R C"], quantizer: Quantizer) -> dict[str, Tensor]:
    """The tensors of a matrix that is stored by a quantizer whose rows stand alone."""
    pieces = [quantizer.encode(rows).tensors for rows in weight.split(_rows(weight))]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _rows(weight: Tensor) -> int:
    return max(1, _ROUNDED_WEIGHTS // max(1, weight.shape[1]))


def form_of(
    rows: int, cols: int, dtype: torch.dtype, quantizer: str, settings: Mapping[str, Any]
) -> tuple[MatrixRecord, dict[str, Form]]:
    """The record of a matrix stored so, and dtype and shape of each of its parts, without the matrix.

    Args:
        rows: output features, or tokens.
        cols: input features.
        dtype: of the matrix when it is decoded.
        quantizer: name of what stores it; its rows stand alone.
        settings: its settings.

    Raises:
        SettingError: the quantizer stores rows together.
    """
    record = MatrixRecord(rows, cols, str(dtype).removeprefix("torch."), (), quantizer, settings)
    stores = quantizer_of(record)
    bits_of_levels(stores)
    sample = stores.encode(torch.zeros(1, cols)).tensors
    forms = {name: (one.dtype, (rows, *one.shape[1:])) for name, one in sorted(sample.items())}
    meta = {"rows": rows, "cols": cols}
    return MatrixRecord(rows, cols, record.dtype, tuple(forms), quantizer, dict(settings), meta), forms


def pack_skeleton(
    model: nn.Module,
    view: StoredView,
    records: Mapping[str, MatrixRecord],
    forms: Mapping[str, Mapping[str, Form]],
) -> None:
    """Put modules that read codes in the place of a skeleton's linear layers and embeddings, empty yet.

    Args:
        model: without weights.
        view: the checkpoint that it was built from.
        records: how matrices are stored, by their names on disk.
        forms: dtype and shape of each part.
    """
    places = {id(one.module): one for one in packable_modules(model)}
    for slot in slots(model):
        name = stored_name(slot, view)
        if name is None or name not in records:
            continue
        record = records[name]
        # Tied modules hold the same codes.
        parts = {
            part: torch.empty(shape, dtype=dtype, device="meta")
            for part, (dtype, shape) in forms[name].items()
        }
        for module, _ in slot.holders:
            place = places[id(module)]
            setattr(place.owner, place.attribute, _packed(module, parts, record, slot.empty.dtype))


def forms_in(view: StoredView) -> dict[str, dict[str, Form]]:
    """Dtype and shape of each part of the matrices that a checkpoint has in fewer bits."""
    found = {}
    for name, record in view.matrices.items():
        entries = {part: view.entries[matrix_part(name, part)] for part in record.parts}
        found[name] = {part: (entry.dtype, entry.shape) for part, entry in entries.items()}
    return found


def part_of(slot: Slot, view: StoredView) -> str | None:
    """On-disk name of the part of a matrix in fewer bits that goes to a slot; None for another slot."""
    for name in slot.names:
        module, _, part = name.rpartition(".")
        source = view.sources.get(f"{module}.weight")
        if source is not None and source.names[0] in view.matrices:
            return matrix_part(source.names[0], part)
    return None


def _packed(
    module: Any, parts: Mapping[str, Tensor], record: MatrixRecord, dtype: torch.dtype
) -> PackedLinear | PackedEmbedding:
    quantizer = quantizer_of(record)
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(
            parts["codes"],
            parts["scales"],
            quantizer=quantizer,
            embedding_dim=record.cols,
            padding_idx=module.padding_idx,
            dtype=dtype,
        )
    made = PackedLinear(
        parts["codes"],
        parts["scales"],
        quantizer=quantizer,
        in_features=record.cols,
        bias=None,
        dtype=dtype,
    )
    made.bias = module.bias
    return made
