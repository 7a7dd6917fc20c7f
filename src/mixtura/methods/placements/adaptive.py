"""Tokens sent to experts, or experts to tokens, whichever moves less in a step."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.placements import Placer
from mixtura.methods.placements._shared import placed_in_order
from mixtura.types.placement import Cluster, LayerPlacement, Placement
from mixtura.types.trace import Trace

METHOD = {
    "paper": 79,
    "title": "Tutel: Adaptive Mixture-of-Experts at Scale",
    "tags": ["each_step", "replicates"],
}


@final
class Adaptive(Placer):
    """Switch, in each step, between sending tokens to experts and sending experts to tokens.

    Adaptive parallelism: experts lie in one layout whatever is chosen, so that switching costs nothing. With
    many tokens it is cheaper to gather every expert on every device, as data parallelism does, and to
    compute all tokens where they are; with few, to send these. What is chosen is what moves fewer bytes:
    twice the rows that leave their device, or the experts that each device lacks.

    Shapes:
        Any number of experts and devices. Owners lie as in the placement contiguous.

    Raises:
        SettingError: ``row_num_bytes`` is out of range.

    Example:
        >>> import torch
        >>> from mixtura.authoring.contracts import sample_cluster
        >>> from mixtura.types.placement import LayerPlacement
        >>> owned, cluster = LayerPlacement(index=0, devices=((0,), (1,))), sample_cluster(1, 2)
        >>> few, many = torch.full((2, 2), 3.0), torch.full((2, 2), 3000.0)
        >>> method = Adaptive(row_num_bytes=100)
        >>> [method.step(owned, loads, 10_000, cluster).devices for loads in (few, many)]
        [((0,), (1,)), ((0, 1), (1, 0))]

    Differences from the paper:
        The authors also split an expert over devices (their r between 1 and the number of devices an expert)
        and choose a degree of pipelining with it by search over measured times; here the two ends of their
        scale are compared by bytes. Backward passes move as much again both ways and do not change the
        choice. ``row_num_bytes`` is 8192, rows of 4096 numbers in 16 bits. The two-dimensional all-to-all is
        the exchange ``two_dimensional``.

    Reference:
        Tutel: Adaptive Mixture-of-Experts at Scale (paper 79).
    """

    def __init__(self, *, row_num_bytes: int = 8192) -> None:
        check_range("Adaptive", "row_num_bytes", row_num_bytes, 1, 1 << 24)
        self.row_num_bytes = row_num_bytes

    def plan(self, trace: Trace, cluster: Cluster) -> Placement:
        return placed_in_order(trace, cluster)

    def step(
        self, owned: LayerPlacement, loads: Float[Tensor, "P E"], expert_num_bytes: int, cluster: Cluster
    ) -> LayerPlacement:
        num_devices = cluster.num_devices
        staying = sum(float(loads[owned.owner(e), e]) for e in range(owned.num_experts) if len(loads) > 1)
        tokens_num_bytes = 2 * self.row_num_bytes * (float(loads.sum()) - staying)
        experts_num_bytes = expert_num_bytes * owned.num_experts * (num_devices - 1)
        if tokens_num_bytes <= experts_num_bytes:
            return owned
        everywhere = tuple(
            (owner, *(device for device in range(num_devices) if device != owner))
            for owner in map(owned.owner, range(owned.num_experts))
        )
        return LayerPlacement(index=owned.index, devices=everywhere, near=True)
