"""Quantile balancing: each expert's bias is set to the score at which it gets just its share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._precision import exact
from mixtura.methods.balancers import Balancer
from mixtura.types import BalancerInput, LayerShape

METHOD = {
    "paper": None,
    "title": "Quantile balancing (Megatron-LM, qb_dual_update)",
    "tags": ["whole_batch"],
}


@final
class Quantile(Balancer):
    """Set each expert's bias at a quantile of the batch's scores, so that it would get just its share.

    A token's bar is its (K+1)-th highest score plus bias: what an expert must beat to be chosen. An
    expert's bias becomes minus the score above that bar which only its share of the tokens, K / E of
    them, exceed: coordinate descent on the dual of the assignment of tokens to experts of equal
    capacity, a step that moves as far as it should without a rate to tune. ``num_rounds`` repeats both
    steps on the same scores; ``memory`` is how much of the old bias is kept. No loss, no gradient.

    Shapes:
        Scores ``[T, E]`` to the state ``bias [E]``, of mean 0, in float32.

    Raises:
        SettingError: ``num_rounds`` is not in [1, 1000], or ``memory`` not in [0, 1].

    Example:
        >>> from mixtura.authoring.contracts._samples import sample_routing
        >>> routing = sample_routing(num_tokens=256, hot=2.0)
        >>> inputs = BalancerInput(routing=routing, state={"bias": torch.zeros(8)})
        >>> bias = Quantile(num_rounds=5).update(inputs)["bias"]
        >>> chosen = (routing.scores + bias)[routing.valid].topk(2).indices
        >>> routing.load.max().item(), chosen.flatten().bincount().max().item()
        (192, 57)

    Differences from the paper:
        No paper of it was at hand; the rule is that of Megatron-LM, where it takes quantiles of the
        router's logits: here of its scores, to which the bias is added. K is the mean number of
        assignments of a valid token, rounded. As there, each micro-batch of each process gives a bias of
        its own, and who trains takes their mean (tag ``whole_batch``), so that a batch in parts has another
        bias than the whole. Biases are shifted to a mean of 0, which changes no choice. Several rounds and
        a memory are ours.

    Reference:
        Quantile balancing: ``qb_dual_update`` in Megatron-LM's ``moe_utils``.
    """

    def __init__(self, *, num_rounds: int = 1, memory: float = 0.0) -> None:
        check_range("Quantile", "num_rounds", num_rounds, 1, 1000)
        check_range("Quantile", "memory", memory, 0, 1)
        self.num_rounds = num_rounds
        self.memory = memory

    def start(self, shape: LayerShape) -> Mapping[str, Tensor]:
        return {"bias": torch.zeros(shape.num_experts, dtype=torch.float32)}

    def update(self, inputs: BalancerInput) -> Mapping[str, Tensor]:
        routing, old = inputs.routing, inputs.state["bias"]
        scores = exact(routing.scores.detach()[routing.valid])
        num_tokens, num_experts = scores.shape
        demand = routing.load if routing.demand is None else routing.demand
        top_k = round(float(demand.sum()) / max(num_tokens, 1))
        if not 0 < top_k < num_experts:
            return {"bias": old.clone()}
        share = num_tokens * top_k // num_experts
        bias = old.to(scores)
        for _ in range(self.num_rounds):
            bar = (scores + bias).topk(top_k + 1, dim=-1).values[:, -1:]
            bias = -(scores - bar).topk(min(share + 1, num_tokens), dim=0).values[-1]
            bias = bias - bias.mean()
        return {"bias": self.memory * old + (1 - self.memory) * bias.to(old)}
