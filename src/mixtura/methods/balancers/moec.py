"""Clusters of experts: alike in routing, and dropped out in part together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._parts import part_of
from mixtura.methods._scores import mean_of_valid
from mixtura.methods.balancers import Balancer
from mixtura.methods.balancers._shared import require_runs, runs
from mixtura.types import BalancerInput, LayerShape

METHOD = {
    "paper": 127,
    "title": "MoEC: Mixture of Expert Clusters",
    "tags": ["regularizer", "reads:generator"],
    "gaps": {"check_expert_order_is_irrelevant": "neighbouring experts form a cluster, so order matters"},
}


@final
class Moec(Balancer):
    """Make the experts of a cluster alike in routing, and drop some experts of every cluster at random.

    Experts fall into ``num_clusters`` equal runs of neighbours. The loss is ``coefficient`` times the
    mean over tokens of the variance of the scores within a cluster, summed over clusters: a token that
    suits one expert of a cluster comes to suit the others, so that tokens spread within it and each
    expert sees more of them. For each optimizer step a share ``dropout`` of the experts of every
    cluster, rounded down, is drawn and not allowed; its tokens then go to the likes of it in the
    cluster. At inference all experts are used: whoever routes then leaves ``allowed`` out. It does not
    even out clusters; use it beside a balancer that does.

    Shapes:
        Scores ``[T, E]`` to one number; state ``allowed [E]``.

    Raises:
        SettingError: ``coefficient`` is not in [0, 1e6], ``num_clusters`` not in [1, 1e6], or
            ``dropout`` not in [0, 0.99].
        UserError: the layer's experts cannot be divided into so many clusters of one size.

    Example:
        >>> from mixtura.authoring.contracts._samples import sample_routing
        >>> balancer = Moec(num_clusters=2, dropout=0.5)
        >>> inputs = BalancerInput(routing=sample_routing(), generator=torch.Generator().manual_seed(0))
        >>> balancer.update(inputs)["allowed"].view(2, 4).sum(-1).tolist()
        [2, 2]

    Differences from the paper:
        Only the abstract was at hand: which clusters the variance is taken over (here all), its scale
        and the moment of dropout (here once an optimizer step, the same for all tokens) are ours.
        Without a generator no expert is dropped.

    Reference:
        MoEC: Mixture of Expert Clusters (paper 127, abstract).
    """

    def __init__(self, *, coefficient: float = 1.0, num_clusters: int = 2, dropout: float = 0.25) -> None:
        check_range("Moec", "coefficient", coefficient, 0, 1e6)
        check_range("Moec", "num_clusters", num_clusters, 1, 1e6)
        check_range("Moec", "dropout", dropout, 0, 0.99)
        self.coefficient = coefficient
        self.num_clusters = num_clusters
        self.dropout = dropout

    def start(self, shape: LayerShape) -> Mapping[str, Tensor]:
        require_runs(shape.num_experts, self.num_clusters, "clusters")
        return {"allowed": torch.ones(shape.num_experts, dtype=torch.bool)}

    def loss(self, inputs: BalancerInput) -> Float[Tensor, ""]:
        routing = inputs.routing
        variance = runs(routing.scores, self.num_clusters, "clusters").var(-1, unbiased=False).sum(-1)
        return self.coefficient * mean_of_valid(variance, routing.valid)

    def update(self, inputs: BalancerInput) -> Mapping[str, Tensor]:
        scores, generator = inputs.routing.scores, inputs.generator
        if generator is None:
            return {"allowed": torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)}
        drawn = torch.rand(scores.shape[1], generator=generator, device=generator.device)
        clusters = runs(drawn, self.num_clusters, "clusters")
        places = clusters.argsort(-1).argsort(-1)
        allowed = places >= part_of(self.dropout, clusters.shape[1])
        return {"allowed": allowed.flatten().to(scores.device)}
