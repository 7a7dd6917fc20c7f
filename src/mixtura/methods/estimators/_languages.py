"""Layers of experts for groups of languages, and the dense network that they come of."""

from __future__ import annotations

from typing import Any, final

from jaxtyping import Float
from torch import Tensor, nn

from mixtura.methods.estimators._columns import NumberColumn
from mixtura.methods.estimators._networks import Passed, perceptron, routed, router, told


@final
class LayersByGroup(nn.Module):
    """A network of layers of which the last become experts, chosen by what group a row is of."""

    def __init__(self, d_in: int, d_out: int, owner: Any) -> None:
        super().__init__()
        width, num = owner.d_hidden, owner.num_experts
        last = (num if owner.families is None else len(owner.families)) - 1
        self.group = NumberColumn("groups of ApolloMoe", owner.group_column, d_in, -1, last)
        self.embed, self.head = nn.Linear(self.group.d_out, width), nn.Linear(width, d_out)
        self.layers = nn.ModuleList(perceptron(width, width, width) for _ in range(owner.num_layers))
        how = {"top_k": owner.top_k, "families": owner.families}
        seeds = range(owner.random_state, owner.random_state + owner.expert_layers)
        self.gates = nn.ModuleList(router("hybrid_language", width, num, seed, **how) for seed in seeds)
        made = (perceptron(width, width, width) for _ in range(num * owner.expert_layers))
        self.experts = nn.ModuleList(made)

    def dense(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n O"]:
        """What the network without experts says."""
        h = self.embed(self.group.features(x))
        for layer in self.layers:
            h = h + layer(h.relu())
        said: Tensor = self.head(h.relu())
        return said

    def copy(self) -> None:
        """Make every expert of a layer what the layer is."""
        num = len(self.experts) // len(self.gates)
        for place, expert in enumerate(self.experts):
            expert.load_state_dict(self.layers[place // num - len(self.gates)].state_dict())

    def forward(self, x: Float[Tensor, "n D"]) -> Passed:
        labels = {"language": self.group.numbers(x)} if self.training else {}
        h, num = self.embed(self.group.features(x)), len(self.experts) // len(self.gates)
        for layer in self.layers[: len(self.layers) - len(self.gates)]:
            h = h + layer(h.relu())
        for place, gate in enumerate(self.gates):
            routing = gate(told(h.relu(), self.training, labels=labels))
            mine = self.experts[place * num : (place + 1) * num]
            h = h + routed(mine, h.relu(), routing, h.shape[1])
        return Passed(output=self.head(h.relu()), routing=routing)
