"""SMILE: bi-level routing, first to a node, then to an expert of that node."""

from __future__ import annotations

from typing import final

from torch import Tensor

from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact_logits
from mixtura.methods.routers import Router
from mixtura.methods.routers._levels import two_levels
from mixtura.methods.routers._losses import unevenness
from mixtura.methods.routers._shared import check_parts
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 108,
    "title": "SMILE: Scaling Mixture-of-Experts with Efficient Bi-level Routing",
    "tags": ["token_independent", "lowest_index"],
}


@final
class Smile(Router):
    """Send each token to its most probable node and, there, to its most probable expert.

    Splitting the decision splits the exchange between machines in two: a small one between nodes and one
    within a node. The node's probability times that of the expert within the node is the weight. Experts
    ``0 .. E / num_nodes - 1`` are those of node 0, and so on. With ``shared_rows`` the expert's place
    within a node is decided by the same rows in every node, so that ``num_nodes + E / num_nodes`` rows
    suffice. Of equal probabilities the lowest index wins. Two losses add up: ``inter_node`` evens out the
    nodes, ``intra_node`` the experts of each node, nodes counted by their tokens.

    Shapes:
        ``x [T, D]`` to T assignments; parameters ``node_weight [G, D]`` and ``local_weight``, of
        ``[E / G, D]`` if shared, else ``[E, D]``.

    Raises:
        SettingError: ``num_nodes`` does not divide E, or a coefficient is not in [0, 1e6].

    Example:
        >>> import torch
        >>> router = Smile(LayerShape(d_model=4, d_expert=8, num_experts=6), num_nodes=3)
        >>> routing = router(RouterInput.of(torch.zeros(2, 4)))
        >>> routing.expert_ids.tolist(), [round(weight, 4) for weight in routing.weights.tolist()]
        ([0, 0], [0.1667, 0.1667])

    Differences from the paper:
        The loss within nodes is a mean over nodes weighted by their tokens, so that each loss is its
        coefficient when all is even. There is no limit on tokens per expert here; give one to the layer.
        Only the abstract and a summary were at hand. The summary says that a bi-level router has fewer
        parameters, which holds when nodes share rows: the default.

    Cost:
        Many tokens take less time than top-k's. With a single token a call what counts is the number of
        operations, and two decisions with two losses have twice those of one.

    Reference:
        SMILE: Scaling Mixture-of-Experts with Efficient Bi-level Routing (paper 108, abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        num_nodes: int = 2,
        shared_rows: bool = True,
        inter_coefficient: float = 0.01,
        intra_coefficient: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_parts("Smile", "num_nodes", num_nodes, shape.num_experts)
        self.num_nodes = num_nodes
        self.shared_rows = shared_rows
        self.inter_coefficient = self.within("inter_coefficient", inter_coefficient, 0, 1e6)
        self.intra_coefficient = self.within("intra_coefficient", intra_coefficient, 0, 1e6)
        self.seed = seed
        rows = shape.num_experts // num_nodes if shared_rows else shape.num_experts
        self.node_weight = drawn(seed + 1, num_nodes, shape.d_model)
        self.local_weight = drawn(seed, rows, shape.d_model)

    def forward(self, inputs: RouterInput) -> Routing:
        size = self.shape.num_experts // self.num_nodes
        local_logits = exact_logits(inputs.x, self.local_weight)
        local_logits = local_logits.unflatten(-1, (local_logits.shape[1] // size, size))
        local_logits = local_logits.expand(-1, self.num_nodes, -1)
        levels = two_levels(exact_logits(inputs.x, self.node_weight), local_logits, 1)
        node, local, within = levels.place, levels.local, levels.within
        losses = {
            "inter_node": self.inter_coefficient * unevenness(node, levels.places, inputs.valid),
            "intra_node": self.intra_coefficient * self._within_nodes(node, local, within, inputs.valid),
        }
        weights = levels.places.gather(-1, node) * within.gather(-1, local)
        return self.chose(
            inputs, levels.chosen, weights, scores=levels.scores, logits=levels.logits, losses=losses
        )

    def _within_nodes(self, node: Tensor, local: Tensor, within: Tensor, valid: Tensor) -> Tensor:
        """The unevenness over each node's experts, averaged over nodes by their tokens."""
        total = within.new_zeros(())
        for number in range(self.num_nodes):
            here = valid & (node[:, 0] == number)
            total = total + here.sum() * unevenness(local, within, here)
        return total / valid.sum().clamp(min=1)
