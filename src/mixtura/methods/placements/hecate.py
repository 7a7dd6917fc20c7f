"""Copies of the hottest experts in the room that devices have to spare, anew in each step."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.placements import Placer
from mixtura.methods.placements._shared import alone, heaviest_first, placed, places
from mixtura.types.placement import Cluster, LayerPlacement, Placement
from mixtura.types.trace import Trace

METHOD = {
    "paper": 13,
    "title": "Hecate: Unlocking Efficient Sparse Model Training via Fully Sharded Sparse Data Parallelism",
    "tags": ["each_step", "replicates"],
}


@final
class Hecate(Placer):
    """Copy the hottest experts to room that devices have to spare, in every step, and give gradients back.

    Fully sharded sparse data parallelism: each expert's numbers, gradients and optimizer states lie on one
    device, its owner. In each step the experts that were busiest in the last five steps are sent to other
    devices, as many as can be sent while the part of the layer before them runs (``overlap_s``). If the spare
    room holds all of these they go to every device; else each gets copies in proportion to its load, on nodes
    that do not hold it and have most room. Tokens go to a copy on their own device, then on their node.

    Shapes:
        ``spare`` copies at most on each device and layer.

    Raises:
        SettingError: ``spare`` or ``overlap_s`` is out of range.

    Example:
        >>> import torch
        >>> from mixtura.authoring.contracts import sample_cluster
        >>> from mixtura.types.placement import LayerPlacement
        >>> owned = LayerPlacement(index=0, devices=((0,), (0,), (1,), (1,)))
        >>> loads = torch.tensor([[90.0, 4.0, 3.0, 3.0], [80.0, 4.0, 3.0, 3.0]])
        >>> Hecate(spare=1).step(owned, loads, 0, sample_cluster(1, 2)).devices
        ((0, 1), (0,), (1, 0), (1,))

    Differences from the paper:
        Owners are chosen once, the heaviest expert first to the least busy device that has room; the authors
        choose them over all layers together and again about every hundred steps. ``overlap_s`` 0 does not
        limit what is sent. Copies are dropped after the forward pass and sent again where activations are
        computed again; elsewhere they stay until the backward pass. Nothing overlaps where the backend
        cannot.

    Reference:
        Hecate: Unlocking Efficient Sparse Model Training via Fully Sharded Sparse Data Parallelism (paper
        13).
    """

    window = 5

    def __init__(self, *, spare: int = 2, overlap_s: float = 0.0) -> None:
        check_range("Hecate", "spare", spare, 0, 1 << 16)
        check_range("Hecate", "overlap_s", overlap_s, 0, 3600)
        self.spare = spare
        self.overlap_s = overlap_s

    def plan(self, trace: Trace, cluster: Cluster) -> Placement:
        num_devices = cluster.num_devices
        return placed(
            trace,
            cluster,
            lambda layer: alone(
                layer.index, heaviest_first(layer.load.tolist(), places(layer.shape.num_experts, num_devices))
            ),
        )

    def step(
        self, owned: LayerPlacement, loads: Float[Tensor, "P E"], expert_num_bytes: int, cluster: Cluster
    ) -> LayerPlacement:
        load = loads.sum(0)
        hottest = torch.argsort(load, descending=True, stable=True).tolist()
        hot = [expert for expert in hottest if load[expert] > 0][: self._most_sent(expert_num_bytes, cluster)]
        devices = [list(held) for held in owned.devices]
        spare = min(self.spare, len(hot))
        if len(hot) <= spare:
            for expert in hot:
                devices[expert] += [d for d in range(cluster.num_devices) if d not in devices[expert]]
        elif spare:
            self._share_out(devices, hot, load, spare, cluster)
        return LayerPlacement(index=owned.index, devices=tuple(map(tuple, devices)), near=True)

    def _most_sent(self, expert_num_bytes: int, cluster: Cluster) -> int:
        """Experts that can be sent while the layer's other part runs."""
        if not self.overlap_s or not expert_num_bytes:
            return 1 << 30
        slowest = cluster.between if cluster.num_nodes > 1 else cluster.within
        return int(self.overlap_s * slowest.bytes_per_s / expert_num_bytes)

    def _share_out(
        self, devices: list[list[int]], hot: list[int], load: Tensor, spare: int, cluster: Cluster
    ) -> None:
        """Give the hottest experts copies in proportion to their loads, as far as there is room."""
        room = [spare] * cluster.num_devices
        total, all_room = float(load[hot].sum()), spare * cluster.num_devices
        for expert in hot:
            wanted = max(1, round(all_room * float(load[expert]) / total))
            for _ in range(wanted):
                free = [d for d in range(cluster.num_devices) if room[d] and d not in devices[expert]]
                if not free:
                    break
                nodes = {cluster.node(d) for d in devices[expert]}
                best = min(free, key=lambda d: (cluster.node(d) in nodes, -room[d], d))
                devices[expert].append(best)
                room[best] -= 1
