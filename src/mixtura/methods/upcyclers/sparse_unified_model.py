"""SparseUnifiedModel: important neurons for every token, the others dealt out to experts."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from mixtura.errors import UnmetError, UserError, check_range
from mixtura.methods._parts import part_of
from mixtura.methods.upcyclers import Upcycler
from mixtura.methods.upcyclers._shared import needed
from mixtura.types import Action
from mixtura.types.upcycling import (
    Build,
    Carry,
    DenseShape,
    DenseTrace,
    Recipe,
    SetRouter,
    UpcycleShape,
    array_name,
)

METHOD = {
    "paper": 31,
    "title": "Understanding and Harnessing Sparsity in Unified Multimodal Models",
    "tags": ["reads:activations"],
}


@final
class SparseUnifiedModel(Upcycler):
    """Give the most important neurons to every token and deal the others out to experts of like importance.

    Importance is the mean absolute input that a neuron gives the down projection, on calibration text. The
    first ``shared`` of the neurons become an expert that every token visits; the others are dealt to the
    experts in the order of importance, forth and back, so that all have about the same. With all experts on
    and a router of zeros (``router_std=0``) the model computes what the dense one does.

    Shapes:
        A source of L layers to E experts of equal width, and a shared one of at least ``shared * F``.

    Raises:
        SettingError: ``shared`` is not in [0.01, 0.99] or ``router_std`` not in [0, 10].
        UnmetError: there are more experts than neurons that are left.

    Example:
        >>> from mixtura.authoring.contracts import sample_dense_trace
        >>> dense = DenseShape(d_model=4, d_ffn=8, num_layers=1)
        >>> trace = sample_dense_trace(dense, seed=0)
        >>> recipe = SparseUnifiedModel().recipe((dense,), UpcycleShape(num_experts=2, top_k=1), trace)
        >>> [len(recipe.arrays[action.neurons]) for action in recipe.actions[1:4]]
        [4, 2, 2]

    Differences from the paper:
        Weights are those of the family, 1 / K with a factor K in the down projection, not 0 or 1 with a
        straight-through gradient, so that ordinary families hold the model. Every layer is cut; there the
        first and the last stay dense. The router begins with small numbers instead of zeros, for which a
        choice of the highest would always be of the same experts. There it is applied to the generating part
        of multimodal models, with 32 experts of which 16 are on. The code's notebook draws scores at random;
        here they are measured, as the paper says.

    Reference:
        Understanding and Harnessing Sparsity in Unified Multimodal Models (paper 31); repository
        Shwai-He/SparseUnifiedModel, as notes on it describe it.
    """

    def __init__(self, *, shared: float = 0.5, router_std: float = 0.001) -> None:
        check_range("SparseUnifiedModel", "shared", shared, 0.01, 0.99)
        check_range("SparseUnifiedModel", "router_std", router_std, 0, 10)
        self.shared, self.router_std = shared, router_std

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        dense, number = sources[0], shape.num_experts
        part = (dense.d_ffn - part_of(self.shared, dense.d_ffn)) // number
        if part < 1:
            raise UnmetError(
                f"{number} experts find no neuron each among those of {dense.d_ffn} that are not shared; "
                "give fewer experts or a smaller share"
            )
        actions: list[Action] = [Carry((0,), (1.0,))]
        arrays: list[Tensor] = []
        for layer, seen in enumerate(needed(trace, "SparseUnifiedModel").layers):
            if seen.activations is None:
                raise UserError("this trace has no activations of neurons; trace again asking for them")
            ordered = seen.activations.argsort(descending=True, stable=True)
            cut = dense.d_ffn - part * number
            groups = [ordered[:cut], *_dealt(ordered[cut:], number)]
            for expert, ids in zip((None, *range(number)), groups, strict=True):
                arrays.append(ids.sort().values.int())
                scale = 1.0 if expert is None else float(shape.top_k)
                actions.append(Build(layer, expert, 0, array_name(arrays[-1]), scale))
            actions.append(SetRouter(layer, "normal", self.router_std, shape.seed))
        return Recipe.of(actions, arrays)


def _dealt(ordered: Int[Tensor, " N"], number: int) -> list[Int[Tensor, " M"]]:
    """Rows of one for each expert, every other row in the opposite order."""
    rows = ordered.view(-1, number).clone()
    rows[1::2] = torch.flip(rows[1::2], (1,))
    return list(rows.T)
