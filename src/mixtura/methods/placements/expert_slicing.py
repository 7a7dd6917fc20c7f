"""Experts cut over several devices, as many as each layer's number of experts leaves."""

from __future__ import annotations

from typing import final

from mixtura.errors import UserError, check_range
from mixtura.methods.placements import Placer
from mixtura.methods.placements._shared import in_order, placed
from mixtura.types.placement import Cluster, LayerPlacement, Placement
from mixtura.types.trace import LayerTrace, Trace

METHOD = {
    "paper": 38,
    "title": "DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power "
    "Next-Generation AI Scale",
    "tags": ["slices"],
}


@final
class ExpertSlicing(Placer):
    """Cut experts over several devices where there are more devices than experts, layer by layer.

    Expert slicing: each device of a group holds a part of the expert's hidden features, computes it for every
    token of the expert, and the parts' outputs are added up. Layers may have different numbers of experts, as
    in a pyramid of layers: each gets the degree of expert parallelism that its own number allows, and as many
    parts as devices are left.

    Shapes:
        ``parts`` divides the number of devices and the experts' hidden features.

    Raises:
        SettingError: ``parts`` is out of range.
        UserError: it does not divide the devices or the hidden features.

    Example:
        >>> from mixtura.authoring.contracts import sample_cluster, sample_trace
        >>> few = sample_trace(num_experts=2)
        >>> ExpertSlicing().plan(few, sample_cluster()).layers[0].devices
        ((0, 1), (2, 3))

    Differences from the paper:
        There data parallelism of experts fills what is left as well; choose the placement
        ``expert_data_parallel`` for that. ``parts`` 0 is the number of devices by that of experts, at least 1
        and a divisor of both devices and hidden features. The pyramid of layers itself is a model's
        configuration, the residual expert the form ``residual_branch``.

    Reference:
        DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale
        (paper 38).
    """

    def __init__(self, *, parts: int = 0) -> None:
        check_range("ExpertSlicing", "parts", parts, 0, 1 << 16)
        self.parts = parts

    def plan(self, trace: Trace, cluster: Cluster) -> Placement:
        def place(layer: LayerTrace) -> LayerPlacement:
            num_experts, d_expert = layer.shape.num_experts, layer.shape.d_expert
            most = max(cluster.num_devices // num_experts, 1)
            fitting = (p for p in range(most, 0, -1) if cluster.num_devices % p == d_expert % p == 0)
            parts = self.parts or next(fitting)
            if cluster.num_devices % parts or d_expert % parts:
                raise UserError(
                    f"layer {layer.index}: {parts} parts divide neither or only one of {cluster.num_devices} "
                    f"devices and {d_expert} hidden features; set parts to a divisor of both, or to 0"
                )
            dealt = in_order(num_experts, cluster.num_devices // parts)
            devices = tuple(tuple(range(at * parts, (at + 1) * parts)) for at in dealt)
            return LayerPlacement(index=layer.index, devices=devices, parts=parts)

        return placed(trace, cluster, place)
