"""Finedeep's routing: every expert runs, and its own output says how much of it counts."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact, full_precision
from mixtura.methods.mixers import Mixer
from mixtura.methods.mixers._shared import shares
from mixtura.types import ExpertsHandle, LayerShape, RouterInput, Routing

METHOD = {
    "paper": 53,
    "title": "Finedeep: Mitigating Sparse Activation in Dense LLMs via Multi-Layer Fine-Grained Experts",
    "tags": ["token_independent"],
}


@final
class OutputSigmoid(Mixer):
    """Weigh each expert by a sigmoid of its own output's product with a vector, and add all of them up.

    ``o_e = E_e(x)``; the output is ``sum_e sigmoid(w_e . o_e) * o_e``. Nothing is chosen and experts do not
    compete: shares do not sum to 1. With narrow experts and the form ``stacked`` this is a dense part cut up,
    at its cost.

    Shapes:
        ``x [T, D]`` to ``[T, D]``; one parameter, ``weight [E, D]``.

    Example:
        >>> from mixtura.modeling.layer import Experts
        >>> shape = LayerShape(d_model=4, d_expert=8, num_experts=3)
        >>> output, routing = OutputSigmoid(shape)(RouterInput.of(torch.eye(4)), Experts(shape).matrices)
        >>> output.shape, routing.load.tolist()
        (torch.Size([4, 4]), [4, 4, 4])

    Differences from the paper:
        Only a summary of the paper was at hand, which says that the weights are a sigmoid of a routing
        computed from the experts' outputs; that it is a product with one vector an expert is ours.

    Reference:
        Finedeep: Mitigating Sparse Activation in Dense LLMs via Multi-Layer Fine-Grained Experts (paper 53,
        abstract and a summary).
    """

    def __init__(self, shape: LayerShape, *, seed: int = 0) -> None:
        super().__init__(shape)
        self.seed = seed
        self.weight = router_weight(shape, seed)

    @full_precision()
    def forward(self, inputs: RouterInput, experts: ExpertsHandle) -> tuple[Float[Tensor, "T D"], Routing]:
        rows, count = inputs.valid.nonzero().squeeze(-1), self.shape.num_experts
        everyone = torch.arange(count, device=rows.device).repeat(len(rows))
        made = exact(experts.run(inputs.x, rows.repeat_interleave(count), everyone))
        made = made.view(len(rows), count, self.shape.d_model)
        logits = (made * exact(self.weight)).sum(-1)
        summed = (logits.sigmoid()[..., None] * made).sum(1).to(inputs.x.dtype)
        empty = logits.new_zeros(len(inputs.x), count)
        routing = shares(
            empty.index_copy(0, rows, logits.sigmoid()),
            logits=empty.index_copy(0, rows, logits),
            valid=inputs.valid,
        )
        return torch.zeros_like(inputs.x).index_copy(0, rows, summed), routing
