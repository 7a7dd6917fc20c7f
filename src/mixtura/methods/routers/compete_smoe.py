"""CompeteSMoE: on some steps all experts compete by their outputs, and the router learns who wins."""

from __future__ import annotations

import random
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import check_range
from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods._scores import mean_of_valid, softmax, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._losses import alikeness
from mixtura.methods.routers._shared import best
from mixtura.types import ExpertsHandle, LayerShape, RouterInput, Routing

METHOD = {
    "paper": 90,
    "title": "CompeteSMoE -- Statistically Guaranteed Mixture of Experts Training via Competition",
    "tags": [
        "normalized",
        "token_independent",
        "lowest_index",
        "keeps_weights",
        "reads:training",
        "reads:step",
        "reads:layer",
        "reads:experts",
    ],
}


@final
class CompeteSmoe(Router):
    """Let experts compete on some training steps; the router learns to foretell the winners.

    In a competition, on steps drawn with chance ``rate`` from ``warm_up`` on, every expert computes every
    token. Its affinity is the mean softplus of its output; the ``top_k`` highest win, weighted by affinity
    over their sum. The loss ``router`` is the mean squared difference of the router's probabilities from
    the softmax of affinities (plus ``winners`` times that of the winners), ``diversity`` how alike winners'
    outputs are by cosine. Else the router's softmax decides. Of equal scores the lowest index wins. At
    most ``max_layers`` layers compete in one step: all draw them alike, from the same ``schedule_seed``.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        UserError: a setting is out of range, or no experts are given for a competition.

    Example:
        >>> router = CompeteSmoe(LayerShape(d_model=4, d_expert=8, num_experts=3), rate=0.25)
        >>> sum(router.competes(layer=0, step=step) for step in range(1000))
        272

    Differences from the paper:
        A layer beyond ``max_layers`` does not compete; Fsoft-AIC/CompeteSMoE moves it to another step.
        Balancing is a balancer's, on affinities too. The layer computes winners once more.

    Reference:
        CompeteSMoE -- Statistically Guaranteed Mixture of Experts Training via Competition (paper 90).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        rate: float = 0.1,
        warm_up: int = 0,
        max_layers: int = 1000,
        router_coefficient: float = 1.0,
        winners: float = 0.0,
        diversity_coefficient: float = 0.01,
        schedule_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_range("CompeteSmoe", "top_k", top_k, 1, shape.num_experts)
        check_range("CompeteSmoe", "rate", rate, 0, 1)
        check_range("CompeteSmoe", "warm_up", warm_up, 0, 1e8)
        check_range("CompeteSmoe", "max_layers", max_layers, 1, 1e6)
        check_range("CompeteSmoe", "schedule_seed", schedule_seed, 0, 1 << 31)
        self.top_k, self.rate, self.warm_up, self.max_layers = top_k, rate, warm_up, max_layers
        self.router_coefficient, self.winners = router_coefficient, winners
        self.diversity_coefficient, self.schedule_seed = diversity_coefficient, schedule_seed
        self.seed = seed
        for name in ("router_coefficient", "winners", "diversity_coefficient"):
            check_range("CompeteSmoe", name, getattr(self, name), 0, 1e6)
        self.weight = router_weight(shape, seed)

    def competes(self, layer: int, step: int) -> bool:
        """Whether the experts of a layer compete on a training step: the same whenever it is asked."""
        luck = random.Random(self.schedule_seed * 1_000_003 + step)
        drawn = [luck.random() < self.rate for _ in range(layer + 1)]
        return step >= self.warm_up and drawn[-1] and sum(drawn) <= self.max_layers

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        scores = softmax(logits)
        losses: dict[str, Tensor] = {}
        if inputs.training and self.competes(inputs.layer, inputs.step):
            logits, scores, losses = self._competition(scores, inputs)
        weighed = logits if losses else scores  # affinities, in a competition
        chosen = best(weighed, self.top_k)
        weights = to_sum_one(weighed.gather(-1, chosen)).to(inputs.x.dtype)
        return Routing.from_choices(
            chosen, weights, scores=scores, logits=logits, valid=inputs.valid, losses=losses
        )

    def _competition(self, foretold: Tensor, inputs: RouterInput) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Affinities, their softmax, and the losses."""
        experts: ExpertsHandle = inputs.need("experts", "CompeteSmoe")
        tokens, every = torch.ones_like(foretold).nonzero(as_tuple=True)
        outputs = exact(experts.run(inputs.x, tokens, every)).view(*foretold.shape, inputs.x.shape[1])
        affinities = F.softplus(outputs).mean(-1)
        shares, chosen = softmax(affinities), best(affinities, self.top_k)
        missed = (foretold - shares.detach()).square()
        teach = missed.mean(-1) + self.winners * missed.gather(-1, chosen).mean(-1)
        alike = alikeness(outputs.gather(1, chosen[..., None].expand(-1, -1, outputs.shape[2])))
        taught = self.router_coefficient * mean_of_valid(teach, inputs.valid)
        diversity = self.diversity_coefficient * mean_of_valid(alike, inputs.valid)
        return affinities, shares, {"router": taught, "diversity": diversity}
