"""What goes between devices, against loops over every source, expert and copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtura.authoring.contracts import sample_cluster
from mixtura.running.parallel.traffic import between_devices, traffic_of
from mixtura.types.placement import Cluster, LayerPlacement

LAYERS = {
    "one each": LayerPlacement(index=0, devices=tuple((e % 4,) for e in range(6))),
    "copies": LayerPlacement(index=0, devices=((0, 2, 3), (1,), (3, 0), (2,), (1,), (0,))),
    "shares": LayerPlacement(
        index=0, devices=((0, 3), (1,), (2, 1)), shares=((0.25, 0.75), (1.0,), (0.0, 1.0))
    ),
    "near": LayerPlacement(index=0, devices=((0, 2), (1,), (3, 0, 1), (2,)), near=True),
    "parts": LayerPlacement(index=0, devices=((0, 1), (2, 3), (1, 2, 3, 0)), parts=2),
    "near parts": LayerPlacement(index=0, devices=((0, 1, 2, 3), (2, 3)), parts=2, near=True),
}


def slowly(at: LayerPlacement, loads: torch.Tensor, cluster: Cluster) -> np.ndarray:
    """Rows from each device to each other, one source, expert and group of devices after the other."""
    found = np.zeros((cluster.num_devices,) * 2)
    for source in range(cluster.num_devices):
        for expert, held in enumerate(at.devices):
            groups = [held[start : start + at.parts] for start in range(0, len(held), at.parts)]
            shares = list(at.shares_of(expert))
            if at.near:
                home = [source in group for group in groups]
                node = [any(cluster.node(d) == cluster.node(source) for d in group) for group in groups]
                near = home if any(home) else node
                if any(near):
                    shares = [one / sum(near) for one in near]
            for group, share in zip(groups, shares, strict=True):
                for device in group:
                    found[source, device] += share * float(loads[source, expert])
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_traffic_is_that_of_a_loop(name: str) -> None:
    at, cluster = LAYERS[name], sample_cluster(2, 2)
    loads = torch.rand(4, at.num_experts, generator=torch.Generator().manual_seed(1)).double() * 100
    rows = slowly(at, loads, cluster)
    np.testing.assert_allclose(between_devices(at, loads, cluster), rows, atol=1e-9)
    found = traffic_of(at, loads, cluster)
    node = np.arange(4) // 2
    inside = (node[:, None] == node) & ~np.eye(4, dtype=bool)
    for side, apart in enumerate((inside, node[:, None] != node)):
        np.testing.assert_allclose(found.sent[side], (rows * apart).sum(1), atol=1e-9)
        np.testing.assert_allclose(found.received[side], (rows * apart).sum(0), atol=1e-9)
    np.testing.assert_allclose(found.computed, rows.sum(0) / at.parts, atol=1e-9)
    turned = rows * (np.arange(4)[:, None] % 2 != np.arange(4) % 2)
    np.testing.assert_allclose(found.turned, [turned.sum(1), turned.sum(0)], atol=1e-9)
