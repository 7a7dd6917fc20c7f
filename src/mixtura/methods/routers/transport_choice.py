"""Expert choice on a transport plan: by Sinkhorn, or sparse by constraint."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.routers import Router
from mixtura.methods.routers._capacity import room
from mixtura.methods.routers._shared import (
    best,
    exact_logits,
    rank_in_sequence,
    router_weight,
    sinkhorn,
    softmax,
)
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 140,
    "title": "Routers in Vision Mixture of Experts: An Empirical Study",
    "tags": [
        "looks_ahead",
        "causal_inference",
        "batch_dependent",
        "keeps_weights",
        "reads:training",
        "reads:causal",
    ],
}


@final
class TransportChoice(Router):
    """Let experts take their best tokens of the batch by a transport plan between tokens and experts.

    The plan moves the mass 1 of every token to E experts that hold equally much. With ``plan="sinkhorn"``
    it is entropic (Sinkhorn's iterations at ``regularization`` as temperature), and each expert takes the
    ``capacity_factor * tokens / E`` (rounded up) tokens of highest mass. With ``"sparse"`` it is the plan
    with a squared penalty, ``regularization / 2`` times its square, in which no expert has mass of more
    tokens than that: those with mass are taken. It is found by ``num_iterations`` gradient steps on the
    tokens' prices; experts hold exactly their share, tokens nearly 1. The mass is the weight. Of equal
    masses the earlier token is taken. At inference in a decoder, where later tokens are unknown, each token
    takes its ``capacity_factor`` most probable experts, weighted by a softmax.

    Shapes:
        ``x [T, D]`` to at most ``T * capacity_factor`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``capacity_factor`` is not in [1, E], ``regularization`` not in [1e-3, 1e3], or
            ``num_iterations`` not in [1, 10000].

    Example:
        >>> router = TransportChoice(LayerShape(d_model=4, d_expert=8, num_experts=2), capacity_factor=1.0)
        >>> router(RouterInput.of(torch.eye(4), training=True)).load.tolist()
        [2, 2]

    Differences from the paper:
        The study's Sinkhorn and sparsity-constrained expert choice; only abstracts were at hand, so how
        plans are solved is ours, as is the rule for decoding. Its expert choice by softmax is
        ``expert_choice``, its soft router the mixer ``soft_moe``. The whole batch is one group.

    Cost:
        In training ``num_iterations`` rounds follow one another, each with a sort of all tokens for every
        expert (``"sparse"``) or two passes over the table (``"sinkhorn"``): several times top-k's time.
        Inference in a decoder is as fast as top-k.

    Reference:
        Routers in Vision Mixture of Experts: An Empirical Study (paper 140, abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        plan: Literal["sinkhorn", "sparse"] = "sparse",
        capacity_factor: float = 2.0,
        regularization: float = 1.0,
        num_iterations: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_range("TransportChoice", "capacity_factor", capacity_factor, 1, shape.num_experts)
        check_range("TransportChoice", "regularization", regularization, 1e-3, 1e3)
        check_range("TransportChoice", "num_iterations", num_iterations, 1, 10000)
        self.plan, self.capacity_factor = plan, capacity_factor
        self.regularization, self.num_iterations = regularization, num_iterations
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        if inputs.causal and not inputs.training:
            scores = softmax(logits)
            chosen = best(scores, round(self.capacity_factor))
            weights = scores.gather(-1, chosen).to(inputs.x.dtype)
            return Routing.from_choices(chosen, weights, scores=scores, logits=logits, valid=inputs.valid)
        capacity = room(inputs.valid, self.shape.num_experts, self.capacity_factor)
        if self.plan == "sinkhorn":
            scores = sinkhorn(
                logits, inputs.valid, num_iterations=self.num_iterations, temperature=self.regularization
            )
            taken = rank_in_sequence(scores, inputs.valid, torch.zeros_like(inputs.sequences)) < capacity
        else:
            rows = inputs.valid.nonzero().squeeze(-1)
            scores = torch.zeros_like(logits).index_copy(0, rows, self._sparse(logits[rows], capacity))
            taken = scores > 0
        token_ids, expert_ids = taken.nonzero(as_tuple=True)
        weights = scores[token_ids, expert_ids].to(inputs.x.dtype)
        return Routing.from_assignments(
            token_ids, expert_ids, weights, scores=scores, logits=logits, valid=inputs.valid
        )

    def _sparse(self, logits: Float[Tensor, "n E"], capacity: int) -> Float[Tensor, "n E"]:
        prices, plan = torch.zeros_like(logits[:, :1]), torch.zeros_like(logits)
        for _ in range(self.num_iterations if logits.shape[0] else 0):
            wanted = (logits + prices) / self.regularization
            top = torch.sort(wanted, dim=0, descending=True, stable=True)
            values = top.values[:capacity]
            # Lower all by what leaves the expert its share of the mass when negative ones are cut to 0.
            counts = torch.arange(1, values.shape[0] + 1, device=values.device)[:, None]
            levels = (values.cumsum(0) - logits.shape[0] / logits.shape[1]) / counts
            last = (values > levels).sum(0, keepdim=True) - 1
            mass = (values - levels.gather(0, last)).relu()
            plan = torch.zeros_like(logits).scatter(0, top.indices[:capacity], mass)
            prices = prices + self.regularization / logits.shape[1] * (1 - plan.sum(-1, keepdim=True))
        return plan
