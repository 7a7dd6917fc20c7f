"""Several groups of devices that hold all experts each."""

from __future__ import annotations

from typing import final

from mixtura.errors import UserError, check_range
from mixtura.methods.placements import Placer
from mixtura.methods.placements._shared import in_order, placed
from mixtura.types.placement import Cluster, LayerPlacement, Placement
from mixtura.types.trace import LayerTrace, Trace

METHOD = {
    "paper": 168,
    "title": "Scalable and Efficient MoE Training for Multitask Multilingual Models",
    "tags": ["replicates"],
}


@final
class ExpertDataParallel(Placer):
    """Split devices into groups that hold all experts each, so that tokens never leave their group.

    Expert parallelism inside a group, data parallelism between groups: with fewer experts than devices all
    have something to do, and with groups of a node no token crosses between nodes. Groups give gradients of
    an expert to its owner, the copy in the first group.

    Shapes:
        A group has ``degree`` devices; the number of devices is a multiple of it.

    Raises:
        SettingError: ``degree`` is out of range.
        UserError: it does not divide the number of devices.

    Example:
        >>> from mixtura.authoring.contracts import sample_cluster, sample_trace
        >>> ExpertDataParallel(degree=2).plan(sample_trace(), sample_cluster()).layers[0].devices[:5]
        ((0, 2), (0, 2), (0, 2), (0, 2), (1, 3))

    Differences from the paper:
        Of the paper, whose abstract and code were read, this is the composition of expert and data
        parallelism; sharding of optimizer states and cutting tensors are other engines'. Its random choice of
        tokens over capacity is ``order="random"`` of a layer's capacity, its pruning of experts by use the
        pruner ``utilisation``. ``degree`` 0 is a node's devices, at most as many as experts.

    Reference:
        Scalable and Efficient MoE Training for Multitask Multilingual Models (paper 168).
    """

    def __init__(self, *, degree: int = 0) -> None:
        check_range("ExpertDataParallel", "degree", degree, 0, 1 << 20)
        self.degree = degree

    def plan(self, trace: Trace, cluster: Cluster) -> Placement:
        def place(layer: LayerTrace) -> LayerPlacement:
            num_experts = layer.shape.num_experts
            sizes = (d for d in range(cluster.devices_per_node, 0, -1) if cluster.devices_per_node % d == 0)
            degree = self.degree or next(size for size in sizes if size <= num_experts)
            if cluster.num_devices % degree:
                raise UserError(
                    f"groups of {degree} devices do not divide {cluster.num_devices}; set degree to a number "
                    "that does, or to 0"
                )
            dealt = in_order(num_experts, degree)
            starts = range(0, cluster.num_devices, degree)
            devices = tuple(tuple(start + at for start in starts) for at in dealt)
            return LayerPlacement(index=layer.index, devices=devices, near=True)

        return placed(trace, cluster, place)
