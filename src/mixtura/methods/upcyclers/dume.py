"""DUME: one expert of each model, with routers that ridge regression finds without training."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UserError, check_range
from mixtura.methods.upcyclers import Upcycler
from mixtura.methods.upcyclers._shared import carried, needed, one_each, unit_rows, with_rows
from mixtura.types.upcycling import DenseShape, DenseTrace, LayerInputs, Recipe, UpcycleShape

METHOD = {
    "paper": 213,
    "title": "Training-Free Dynamic Upcycling of Expert Language Models",
    "tags": ["composes", "initial:dense", "reads:own", "reads:products"],
}


@final
class Dume(Upcycler):
    """Average what stands outside the experts, and let regression tell each domain's tokens apart.

    Every model's text runs through the averaged model with that model's own feed-forward parts. In each
    layer ridge regression from the inputs to which model a token is of, W = (XᵀX + λI)⁻¹XᵀY, gives a row an
    expert; rows are made of one length and divided by ``temperature``. Another model is added by adding its
    sums. No step of training is needed.

    Shapes:
        E sources of L layers to E experts of their width in each.

    Raises:
        SettingError: ``ridge`` is not in [1e-9, 1e6] or ``temperature`` not in [1e-3, 1e3].
        UserError: a source has no prompts, or there are not as many sources as experts.

    Example:
        >>> from mixtura.authoring.contracts import sample_dense_trace
        >>> dense = DenseShape(d_model=4, d_ffn=8, num_layers=1)
        >>> trace = sample_dense_trace(dense, seed=0, num_groups=2)
        >>> recipe = Dume().recipe((dense, dense), UpcycleShape(num_experts=2, top_k=1), trace)
        >>> [round(row.norm().item(), 3) for row in recipe.arrays[recipe.actions[-1].rows]]
        [10.0, 10.0]

    Differences from the paper:
        The regression has no intercept, which routers of ordinary families have not; there it has one, that
        is regularised like the rest. It is solved in float64. How many experts a token takes is the user's
        choice; there it is one, and the weights are softmaxed in bfloat16. Of each text as many tokens count
        as the user says, there 512 or 1024. Prompts that an expert is not for are left out.

    Reference:
        Training-Free Dynamic Upcycling of Expert Language Models (paper 213); repository gensyn-ai/dume,
        ``models/mixture_of_experts.py``.
    """

    def __init__(self, *, ridge: float = 0.01, temperature: float = 0.1) -> None:
        check_range("Dume", "ridge", ridge, 1e-9, 1e6)
        check_range("Dume", "temperature", temperature, 1e-3, 1e3)
        self.ridge, self.temperature = ridge, temperature

    def recipe(
        self, sources: tuple[DenseShape, ...], shape: UpcycleShape, trace: DenseTrace | None
    ) -> Recipe:
        seen = needed(trace, "Dume")
        groups = [
            place
            for expert in range(shape.num_experts)
            for place, (own, no) in enumerate(zip(seen.experts, seen.negative, strict=True))
            if own == expert and not no
        ]
        if len(groups) != shape.num_experts:
            raise UserError(f"each of {shape.num_experts} sources needs text of its own; give --prompts")
        actions = [carried("average", len(sources)), *one_each(sources, shape.num_experts)]
        return with_rows(actions, sources[0].num_layers, lambda layer: self._rows(seen.layers[layer], groups))

    def _rows(self, layer: LayerInputs, groups: list[int]) -> Float[Tensor, "E D"]:
        if layer.products is None or layer.targets is None:
            raise UserError("this trace has no products of inputs; trace again asking for them")
        width = layer.means.shape[1]
        products = layer.products[:width, :width].double()
        targets = layer.targets[:width, groups].double()
        solved = torch.linalg.solve(products + self.ridge * torch.eye(width).double(), targets)
        return (unit_rows(solved.T) / self.temperature).float()
