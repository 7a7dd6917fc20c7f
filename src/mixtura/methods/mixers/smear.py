"""SMEAR: one expert a sequence, merged from all of them."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods.mixers import Mixer
from mixtura.methods.mixers._shared import shares
from mixtura.methods.routers._shared import exact, exact_logits, router_weight, softmax
from mixtura.types import ExpertsHandle, LayerShape, RouterInput, Routing

METHOD = {
    "paper": 104,
    "title": "Soft Merging of Experts with Adaptive Routing",
    "tags": ["looks_ahead", "reads:sequence_ids"],
}


@final
class Smear(Mixer):
    """Run one expert whose parameters are the mean of all experts' by a sequence's routing probabilities.

    The router sees the mean of the sequence's tokens, and its softmax weighs every matrix of every
    expert; the merged expert then computes each token of the sequence. It costs about one expert's
    arithmetic and gives the router a gradient without estimates.

    Shapes:
        ``x [T, D]`` to ``[T, D]``; one parameter, ``weight [E, D]``; merging makes one expert a sequence.

    Raises:
        Nothing of its own.

    Example:
        >>> from mixtura.modeling.layer import Experts
        >>> shape = LayerShape(d_model=4, d_expert=8, num_experts=2)
        >>> output, routing = Smear(shape)(RouterInput.of(torch.eye(4)), Experts(shape).matrices)
        >>> output.shape, bool((routing.scores == routing.scores[0]).all())
        (torch.Size([4, 4]), True)

    Differences from the paper:
        Only the abstract and a summary were at hand: that the router reads the mean of the tokens is
        taken from the summary's "example-level". Padding counts nowhere. Without sequence ids all
        tokens are of one sequence.

    Reference:
        Soft Merging of Experts with Adaptive Routing (paper 104).
    """

    def __init__(self, shape: LayerShape, *, seed: int = 0) -> None:
        super().__init__(shape)
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput, experts: ExpertsHandle) -> tuple[Float[Tensor, "T D"], Routing]:
        rows = inputs.valid.nonzero().squeeze(-1)
        sequences, owners = inputs.sequences[rows].unique(return_inverse=True)
        counts = torch.bincount(owners, minlength=sequences.numel())
        x = exact(inputs.x)
        sums = x.new_zeros(sequences.numel(), x.shape[1]).index_add(0, owners, x[rows])
        logits = exact_logits(sums / counts[:, None], self.weight)
        mix = softmax(logits)
        made = experts.merged(mix).run(inputs.x[rows], torch.arange(rows.numel()).to(rows), owners)
        output = torch.zeros_like(inputs.x).index_copy(0, rows, made.to(inputs.x.dtype))
        empty = logits.new_zeros(x.shape[0], self.shape.num_experts)
        routing = shares(
            empty.index_copy(0, rows, mix[owners]),
            logits=empty.index_copy(0, rows, logits[owners]),
            valid=inputs.valid,
        )
        return output, routing
