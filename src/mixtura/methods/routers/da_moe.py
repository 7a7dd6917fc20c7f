"""DA-MoE: tokens that others attend to get more experts."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods._scores import softmax, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 64,
    "title": "DA-MoE: Towards Dynamic Expert Allocation for Mixture-of-Experts Models",
    "tags": [
        "lowest_index",
        "keeps_weights",
        "reads:attention",
        "reads:positions",
        "reads:sequence_ids",
        "reads:causal",
    ],
}


@final
class DaMoe(Router):
    """Send each token to as many of its best experts as the attention it receives is worth.

    A token's importance is the attention that the tokens of its sequence give to it, in total: 1 on
    average over a sequence. It gets ``mean_experts`` times its importance many experts, rounded, at
    least one and at most ``max_experts``: those of highest softmax probability, of equal ones that of
    lowest index. Outputs are weighted by the probabilities, over their sum if ``renormalize``.

    In a decoder (``causal``) a token's later readers are not known when it is routed. There its
    importance is what it gives to itself, against the even share of all tokens so far.

    Shapes:
        ``x [T, D]`` to between T and ``T * max_experts`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``mean_experts`` is not in [1, E], or ``max_experts`` not in [1, 1e6].
        UserError: attention or positions are not given.

    Example:
        >>> router = DaMoe(LayerShape(d_model=2, d_expert=8, num_experts=4), mean_experts=1.0)
        >>> both_read_the_first = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> fields = {"attention": both_read_the_first, "positions": torch.arange(2), "causal": False}
        >>> router(RouterInput.of(torch.eye(2), **fields)).token_ids.bincount().tolist()
        [2, 1]

    Differences from the paper:
        The abstract says that attention decides how many experts a token gets, not by which formula:
        that of importance and number, and the rule for decoders, are ours.

    Reference:
        DA-MoE: Towards Dynamic Expert Allocation for Mixture-of-Experts Models (paper 64, abstract).
    """

    choice_settings = ("mean_experts",)

    def __init__(
        self,
        shape: LayerShape,
        *,
        mean_experts: float = 2.0,
        max_experts: int = 4,
        renormalize: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.mean_experts = self.within("mean_experts", mean_experts, 1, shape.num_experts)
        self.max_experts = self.within("max_experts", max_experts, 1, 1e6)
        self.renormalize = renormalize
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        scores = softmax(logits)
        most = min(self.max_experts, self.shape.num_experts)
        count = (self.mean_experts * _importance(inputs) + 0.5).floor().clamp(1, most)
        chosen = best(scores, most)
        extra = torch.arange(most, device=chosen.device) >= count[:, None]
        weights = scores.gather(-1, chosen).masked_fill(extra, 0.0)
        if self.renormalize:
            weights = to_sum_one(weights)
        return self.chose(
            inputs, chosen.masked_fill(extra, self.shape.num_experts), weights, scores=scores, logits=logits
        )


def _importance(inputs: RouterInput) -> Float[Tensor, " T"]:
    """The attention each token receives, in units of the mean."""
    attention = exact(inputs.need("attention", "DaMoe")).detach()
    positions, sequences = inputs.need("positions", "DaMoe"), inputs.sequences
    # Padding may stand beyond the last column; what it gets is not used.
    column = positions.clamp(max=max(attention.shape[1] - 1, 0))
    if inputs.causal:
        own: Tensor = attention.gather(-1, column[:, None]).squeeze(-1) * (positions + 1)
        return own
    num_sequences = int(sequences.max()) + 1 if sequences.numel() else 0
    given = torch.where(inputs.valid[:, None], attention, 0.0)
    received = attention.new_zeros(num_sequences, attention.shape[1]).index_add(0, sequences, given)
    return received[sequences, column]
