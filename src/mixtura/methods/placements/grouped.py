"""Whole groups of experts on one device, where routers choose as many in each group."""

from __future__ import annotations

from typing import final

from mixtura.errors import UserError, check_range
from mixtura.methods.placements import Placer
from mixtura.methods.placements._shared import alone, in_order, placed
from mixtura.types.placement import Cluster, LayerPlacement, Placement
from mixtura.types.trace import LayerTrace, Trace

METHOD = {
    "paper": 162,
    "title": "Pangu Pro MoE: Mixture of Grouped Experts for Efficient Sparsity",
    "tags": ["equal_counts"],
}


@final
class Grouped(Placer):
    """Lay whole groups of experts on a device, so that routers that choose evenly by group load evenly.

    A router of grouped experts (``moge``) chooses as many experts in each group for every token. With as many
    groups on each device, all devices then have the same to do for any text whatever: the busiest is exactly
    the average one. With other routers this is a plan like any other.

    Shapes:
        Experts of a group are consecutive. As many groups as devices, or a multiple.

    Raises:
        SettingError: ``groups`` is out of range.
        UserError: groups cannot be dealt evenly to the devices.

    Example:
        >>> from mixtura.authoring.contracts import sample_cluster, sample_trace
        >>> Grouped().plan(sample_trace(), sample_cluster()).layers[0].held(4)
        ((0, 1), (2, 3), (4, 5), (6, 7))

    Differences from the paper:
        Only its abstract and the authors' descriptions were read. ``groups`` 0 takes the groups that the
        trace says routers choose by, and one a device where they know none.

    Reference:
        Pangu Pro MoE: Mixture of Grouped Experts for Efficient Sparsity (paper 162).
    """

    def __init__(self, *, groups: int = 0) -> None:
        check_range("Grouped", "groups", groups, 0, 1 << 20)
        self.groups = groups

    def plan(self, trace: Trace, cluster: Cluster) -> Placement:
        def place(layer: LayerTrace) -> LayerPlacement:
            num_experts = layer.shape.num_experts
            known = self.groups or (layer.num_groups if layer.num_groups > 1 else 0)
            if not known and num_experts % cluster.num_devices:
                return alone(layer.index, in_order(num_experts, cluster.num_devices))
            groups = known or cluster.num_devices
            if groups % cluster.num_devices or num_experts % groups:
                raise UserError(
                    f"layer {layer.index} has {num_experts} experts in {groups} groups, which "
                    f"{cluster.num_devices} devices cannot hold evenly; choose a number of devices that "
                    "divides the groups, or another placement"
                )
            dealt = in_order(groups, cluster.num_devices)
            return alone(layer.index, [dealt[e * groups // num_experts] for e in range(num_experts)])

        return placed(trace, cluster, place)
