"""More devices for experts that have more to do, for a whole training or service."""

from __future__ import annotations

from typing import final

from mixtura.errors import check_range
from mixtura.methods.placements import Placer
from mixtura.methods.placements._shared import heaviest_first, placed, places
from mixtura.types.placement import Cluster, LayerPlacement, Placement
from mixtura.types.trace import LayerTrace, Trace

METHOD = {
    "paper": 36,
    "title": "SE-MoE: A Scalable and Efficient Mixture-of-Experts Distributed Training and Inference System",
    "tags": ["replicates", "balances"],
}


@final
class Elastic(Placer):
    """Give experts that are busier more devices, as long as the busiest device gets less to do by that.

    Elastic allocation by load: experts are owned the heaviest first, each by the least busy device that
    has room; then, again and again, the heaviest expert of the busiest device gets a copy on the least
    busy device with room to spare, and shares its tokens with it. The plan stays as it is, whatever a
    step's loads are.

    Shapes:
        ``spare`` copies at most on each device and layer.

    Raises:
        SettingError: ``spare`` is out of range.

    Example:
        >>> from mixtura.authoring.contracts import sample_cluster, sample_trace
        >>> trace = sample_trace()
        >>> trace.layers[0].load.tolist()
        [22, 6, 50, 50, 107, 140, 98, 7]
        >>> made = Elastic().plan(trace, sample_cluster(2, 4)).layers[0]
        >>> [expert for expert, held in enumerate(made.devices) if len(held) > 1]
        [4, 5, 6]

    Differences from the paper:
        Only its abstract was read. There elasticity is of tasks, whose loads differ and that get more or
        fewer devices; here it is of experts. Its prefetching from storage, and its ring of sections for
        inference beyond memory, are not a placement's business: see loading with ``memory=``.

    Reference:
        SE-MoE: A Scalable and Efficient Mixture-of-Experts Distributed Training and Inference System
        (paper 36).
    """

    def __init__(self, *, spare: int = 1) -> None:
        check_range("Elastic", "spare", spare, 0, 1 << 16)
        self.spare = spare

    def plan(self, trace: Trace, cluster: Cluster) -> Placement:
        return placed(trace, cluster, lambda layer: self._place(layer, cluster.num_devices))

    def _place(self, layer: LayerTrace, num_devices: int) -> LayerPlacement:
        loads = [float(one) for one in layer.load.tolist()]
        devices = [[one] for one in heaviest_first(loads, places(len(loads), num_devices))]
        room = [self.spare] * num_devices
        while True:
            busy = _busy(loads, devices, num_devices)
            busiest = max(range(num_devices), key=lambda one: busy[one])
            expert = max(
                (e for e, held in enumerate(devices) if busiest in held),
                key=lambda e: loads[e] / len(devices[e]),
                default=None,
            )
            free = [
                d for d in range(num_devices) if room[d] and expert is not None and d not in devices[expert]
            ]
            if expert is None or not free:
                break
            helper = min(free, key=lambda one: busy[one])
            devices[expert].append(helper)
            if max(_busy(loads, devices, num_devices)) >= busy[busiest]:
                devices[expert].pop()
                break
            room[helper] -= 1
        return LayerPlacement(index=layer.index, devices=tuple(map(tuple, devices)))


def _busy(loads: list[float], devices: list[list[int]], num_devices: int) -> list[float]:
    found = [0.0] * num_devices
    for load, held in zip(loads, devices, strict=True):
        for device in held:
            found[device] += load / len(held)
    return found
