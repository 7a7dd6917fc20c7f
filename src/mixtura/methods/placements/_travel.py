"""What tokens travel between groups of experts of neighbouring layers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mixtura.methods.placements._shared import scipy_optimize
from mixtura.types.placement import Cluster
from mixtura.types.trace import LayerTrace


def seconds_of_pairs(cluster: Cluster) -> NDArray[np.float64]:
    """Seconds that a byte takes from each device to each other."""
    node = np.arange(cluster.num_devices) // cluster.devices_per_node
    same = node[:, None] == node
    costs = np.where(same, 1 / cluster.within.bytes_per_s, 1 / cluster.between.bytes_per_s)
    np.fill_diagonal(costs, 0.0)
    return costs


def flow_of(layer: LayerTrace, here: list[int], there: list[int], num_devices: int) -> NDArray[np.float64]:
    """Tokens from each group to each of the next layer."""
    if layer.transitions is None:
        return np.zeros((num_devices, num_devices))
    first, second = (np.eye(num_devices)[one] for one in (here, there))
    found: NDArray[np.float64] = first.T @ layer.transitions.double().numpy() @ second
    return found


def whole(seat: NDArray[np.float64]) -> list[int]:
    """By group, its device, such that most of what a relaxed program seats there stays."""
    chosen = scipy_optimize("the placement moetuner").linear_sum_assignment(seat, maximize=True)[1]
    return [int(one) for one in chosen]


def swept(
    seated: list[list[int]], flows: list[NDArray[np.float64]], costs: NDArray[np.float64]
) -> list[list[int]]:
    """Lay one layer's groups anew where that costs less in all, its neighbours as they are."""
    best, better = [list(one) for one in seated], True
    while better:
        better = False
        for layer in range(len(best)):
            cost = np.zeros_like(costs)
            if layer > 0:
                cost += flows[layer - 1].T @ costs[best[layer - 1]]
            if layer < len(flows):
                cost += flows[layer] @ costs[:, best[layer + 1]].T
            found = whole(-cost)
            rows = np.arange(len(cost))
            if cost[rows, found].sum() < cost[rows, best[layer]].sum() * (1 - 1e-9):
                best[layer], better = found, True
    return best
