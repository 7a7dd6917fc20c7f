"""What a device has too much of, computed by the least loaded ones."""

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
    "paper": 95,
    "title": "Least-Loaded Expert Parallelism: Load Balancing An Imbalanced Mixture-of-Experts",
    "tags": ["each_step", "replicates", "balances"],
}


@final
class LeastLoaded(Placer):
    """Spill what a device has above its capacity, with the experts' numbers, to the least loaded devices.

    LLEP: once the routers have chosen, no device is to compute more than ``most`` times the average. Experts
    are gone through from the busiest; the owner takes what it has room for, the rest goes in pieces to the
    devices that will have least to do, counting what their own experts still to come will bring them. A piece
    is not smaller than ``least_rows`` unless it is the last. The results are those of plain expert
    parallelism.

    Shapes:
        Any number of experts and devices. Owners lie as in the placement contiguous.

    Raises:
        SettingError: ``most``, ``least_rows`` or ``ratio`` is out of range.

    Example:
        >>> import torch
        >>> from mixtura.authoring.contracts import sample_cluster
        >>> from mixtura.types.placement import LayerPlacement
        >>> owned = LayerPlacement(index=0, devices=((0,), (0,), (1,), (1,)))
        >>> loads = torch.tensor([[300.0, 40.0, 30.0, 30.0]])
        >>> found = LeastLoaded(least_rows=1).step(owned, loads, 0, sample_cluster(1, 2))
        >>> found.devices, [round(share, 2) for share in found.shares[0]]
        (((0, 1), (0,), (1,), (1,)), [0.6, 0.4])

    Differences from the paper:
        Follows the authors' code as published. A share is handed to each source device alike, by rounding, so
        that counts of devices differ from the plan by less than one row a source. ``ratio`` is off (1.0), as
        there by default. Where no helper has room what is left goes to the least loaded, also as there.

    Reference:
        Least-Loaded Expert Parallelism: Load Balancing An Imbalanced Mixture-of-Experts (paper 95).
    """

    def __init__(self, *, most: float = 1.1, least_rows: int = 1024, ratio: float = 1.0) -> None:
        check_range("LeastLoaded", "most", most, 1.0, 1e6)
        check_range("LeastLoaded", "least_rows", least_rows, 1, 1 << 30)
        check_range("LeastLoaded", "ratio", ratio, 1.0, 1e6)
        self.most = most
        self.least_rows = least_rows
        self.ratio = ratio

    def plan(self, trace: Trace, cluster: Cluster) -> Placement:
        return placed_in_order(trace, cluster)

    def step(
        self, owned: LayerPlacement, loads: Float[Tensor, "P E"], expert_num_bytes: int, cluster: Cluster
    ) -> LayerPlacement:
        del expert_num_bytes
        counts = loads.sum(0).tolist()
        pending = [0.0] * cluster.num_devices
        for expert, count in enumerate(counts):
            pending[owned.owner(expert)] += count
        even = sum(counts) / cluster.num_devices
        if max(pending) <= self.ratio * even:
            return owned
        assigned = [0.0] * cluster.num_devices
        devices, shares = list(owned.devices), [(1.0,) for _ in counts]
        for expert in sorted(range(len(counts)), key=lambda one: -counts[one]):
            owner, count = owned.owner(expert), counts[expert]
            pending[owner] -= count
            taken = self._taken(owner, count, assigned, pending, self.most * even)
            for device, rows in taken.items():
                assigned[device] += rows
            if count and set(taken) != {owner}:
                order = (owner, *(device for device in taken if device != owner))
                devices[expert] = order
                shares[expert] = tuple(taken.get(device, 0.0) / count for device in order)
        return LayerPlacement(index=owned.index, devices=tuple(devices), shares=tuple(shares))

    def _taken(
        self, owner: int, count: float, assigned: list[float], pending: list[float], capacity: float
    ) -> dict[int, float]:
        """How many of an expert's rows each device takes."""
        busy = [one + other for one, other in zip(assigned, pending, strict=True)]
        own = min(max(capacity - busy[owner], 0.0), count)
        taken = {owner: own} if own else {}
        left = count - own
        helpers = [device for device in range(len(busy)) if device != owner]
        while left > 0 and helpers:
            helper = self._helper(helpers, busy, left, capacity)
            rows = left if helper is None else min(left, capacity - busy[helper])
            device = min(helpers, key=lambda one: busy[one]) if helper is None else helper
            taken[device] = taken.get(device, 0.0) + rows
            busy[device] += rows
            left -= rows
        if left:
            taken[owner] = count
        return taken

    def _helper(self, helpers: list[int], busy: list[float], left: float, capacity: float) -> int | None:
        """The least loaded device that can take a piece worth its transfer."""
        for device in sorted(helpers, key=lambda one: busy[one]):
            room = capacity - busy[device]
            if room > 0 and (room >= min(self.least_rows, left)):
                return device
        return None
