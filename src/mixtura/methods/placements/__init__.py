"""Which devices of a cluster hold which experts, and which run them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.types.placement import Cluster, LayerPlacement, Placement
from mixtura.types.trace import LayerTrace, Trace

KIND = {
    "base": "Placer",
    "summary": "Chooses the devices that hold and run each expert.",
    "tags": {
        "equal_counts": "each device owns as many experts of each layer as every other where that can be, "
        "none twice, so that transformers' own expert parallelism runs the plan as another order of experts",
        "each_step": "chooses copies and shares anew in each step (`Placer.step`)",
        "replicates": "an expert may run on several devices",
        "slices": "an expert may be cut into parts on several devices",
        "sequences": "splits sequences over devices, too",
        "balances": "on uneven loads its busiest device has no more to do than with experts dealt by number",
        "needs:scipy": "needs scipy (`mixtura[train]` or `mixtura[merge]`)",
    },
}


class Placer(ABC):
    """Decides where experts lie. What that costs and how tokens get there is the core's."""

    # Steps whose loads are averaged for `step`; 0 for the loads that the step's own routers chose.
    window: int = 0

    @abstractmethod
    def plan(self, trace: Trace, cluster: Cluster) -> Placement:
        """Where each expert of the model that a trace was recorded of is to lie.

        Raises:
            UserError: the model's sizes do not fit the cluster.
        """

    def step(
        self, owned: LayerPlacement, loads: Float[Tensor, "P E"], expert_num_bytes: int, cluster: Cluster
    ) -> LayerPlacement:
        """The same experts for one step: owners stay, copies and shares may be others.

        Every process works it out for itself from the same numbers.

        Args:
            owned: the layer's plan.
            loads: assignments by the device that their tokens lie on, and by expert.
            expert_num_bytes: bytes of an expert that is copied.
            cluster: what the devices are.
        """
        del loads, expert_num_bytes, cluster
        return owned


def source_of(num_sequences: int, num_devices: int) -> Tensor:
    """The device that each sequence's tokens lie on: sequences are dealt in blocks, in order."""
    return torch.arange(num_sequences) * num_devices // max(num_sequences, 1)


def loads_of(trace: Trace, layer: LayerTrace, num_devices: int) -> Float[Tensor, "P E"]:
    """How many assignments devices send to each expert, as a trace says.

    Where it holds every token's experts and at least a sequence a device, sequences are dealt to devices
    (`source_of`); else every device is taken to send the same, a part of what was counted.

    >>> from mixtura.authoring.contracts import sample_trace
    >>> trace = sample_trace()
    >>> two, three = (loads_of(trace, trace.layers[0], num) for num in (2, 3))
    >>> two.sum(1).tolist(), three.sum(1).tolist()
    ([160.0, 320.0], [160.0, 160.0, 160.0])
    """
    lengths, choices = trace.sequence_lengths, layer.choices
    num_experts = layer.shape.num_experts
    if choices is None or len(lengths) < num_devices or sum(lengths) != len(choices):
        return (layer.load.double() / num_devices).expand(num_devices, num_experts).clone()
    device = source_of(len(lengths), num_devices).repeat_interleave(torch.tensor(lengths))
    present = (choices >= 0) & (choices < num_experts)
    places = device[:, None] * num_experts + choices
    counted = torch.bincount(places[present], minlength=num_devices * num_experts)
    return counted.double().view(num_devices, num_experts)
