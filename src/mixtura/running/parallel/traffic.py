"""Which device computes what of one layer, and what goes over which link for that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mixtura.types.placement import Cluster, LayerPlacement

Numbers = NDArray[np.float64]


@final
@dataclass(frozen=True, slots=True)
class Traffic:
    """Rows of one layer by device, one way; what comes back is the same turned round.

    Attributes:
        computed: rows that a device's experts compute.
        sent: rows that leave a device, to others of its node and to other nodes: [2, P].
        received: rows that come to a device, likewise.
        turned: rows that must change their place within a node, on whatever node they are: [2, P], those
            that leave a device's place and those that come to it, where nodes are crossed in hops.
    """

    computed: Numbers
    sent: Numbers
    received: Numbers
    turned: Numbers


def traffic_of(at: LayerPlacement, loads: Float[Tensor, "P E"], cluster: Cluster) -> Traffic:
    """What a layer's assignments make devices send and compute.

    >>> import torch
    >>> from mixtura.authoring.contracts import sample_cluster
    >>> at = LayerPlacement(index=0, devices=((0,), (3,)))
    >>> found = traffic_of(at, torch.tensor([[1.0, 2.0]] * 4), sample_cluster(2, 2))
    >>> found.computed.tolist(), found.sent[1].tolist()
    ([4.0, 0.0, 0.0, 8.0], [2.0, 2.0, 1.0, 1.0])
    """
    num_devices = cluster.num_devices
    node = np.arange(num_devices) // cluster.devices_per_node
    place = np.arange(num_devices) % cluster.devices_per_node
    made = Traffic(*(np.zeros(shape) for shape in ((num_devices,), *((2, num_devices),) * 3)))
    for devices, rows in _streams(at, loads.double().numpy(), node):
        same = node[:, None] == node[devices]
        itself = np.arange(num_devices)[:, None] == devices
        np.add.at(made.computed, devices, rows.sum(0) / at.parts)
        for side, apart in enumerate((same & ~itself, ~same)):
            moved = rows * apart
            made.sent[side] += moved.sum(1)
            np.add.at(made.received[side], devices, moved.sum(0))
        moved = rows * (place[:, None] != place[devices])
        made.turned[0] += moved.sum(1)
        np.add.at(made.turned[1], devices, moved.sum(0))
    return made


def between_devices(at: LayerPlacement, loads: Float[Tensor, "P E"], cluster: Cluster) -> Numbers:
    """Rows from each device to each other, for a picture: [P, P], what stays on a device included."""
    num_devices = cluster.num_devices
    node = np.arange(num_devices) // cluster.devices_per_node
    found = np.zeros((num_devices, num_devices))
    for devices, rows in _streams(at, loads.double().numpy(), node):
        np.add.at(found.T, devices, rows.T)
    return found


def _streams(
    at: LayerPlacement, loads: Numbers, node: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], Numbers]]:
    """Devices, and the rows that each source sends to each of them."""
    single = [expert for expert, held in enumerate(at.devices) if len(held) == 1]
    if single:
        yield np.array([at.owner(expert) for expert in single]), loads[:, single]
    for expert, held in enumerate(at.devices):
        if len(held) == 1:
            continue
        groups = np.array(held).reshape(-1, at.parts)
        shares = np.broadcast_to(np.array(at.shares_of(expert)), (len(loads), len(groups)))
        if at.near:
            shares = _nearest(shares, groups, node)
        rows = loads[:, [expert]] * shares
        yield groups.ravel(), np.repeat(rows, at.parts, axis=1)


def _nearest(shares: Numbers, groups: NDArray[np.int64], node: NDArray[np.int64]) -> Numbers:
    """The groups on each source's device if there are any, else on its node, else by shares."""
    sources = np.arange(len(node))
    on_device = (groups[None] == sources[:, None, None]).any(2)
    on_node = (node[groups][None] == node[:, None, None]).any(2)
    for near in (on_node, on_device):
        known = near.sum(1, keepdims=True)
        shares = np.where(known > 0, near / np.maximum(known, 1), shares)
    return shares
