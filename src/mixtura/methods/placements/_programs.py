"""Integer programs, solved exactly or relaxed, by scipy's `milp`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from mixtura.methods.placements._shared import scipy_optimize

_INFINITY = float("inf")


@final
@dataclass(slots=True)
class Program:
    """Least of a sum over variables in [0, 1] or above, under conditions that are added one by one."""

    owner: str
    costs: list[float] = field(default_factory=list)
    highest: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    rows: list[tuple[Mapping[int, float], float, float]] = field(default_factory=list)

    def variables(
        self, *shape: int, cost: float = 0.0, most: float = 1.0, whole: bool = True
    ) -> NDArray[np.int64]:
        """New variables of a shape, by their numbers."""
        count, first = int(np.prod(shape)), len(self.costs)
        self.costs += [cost] * count
        self.highest += [most] * count
        self.whole += [whole] * count
        return np.arange(first, first + count).reshape(shape)

    def require(
        self, terms: Iterable[tuple[Any, Any]], *, least: float = -_INFINITY, most: float = _INFINITY
    ) -> None:
        """Bound a sum of variables with factors; a variable may come twice."""
        summed: dict[int, float] = {}
        for variable, factor in terms:
            summed[int(variable)] = summed.get(int(variable), 0.0) + factor
        self.rows.append((summed, least, most))

    def equal(self, variables: Iterable[Any], value: float) -> None:
        """Let variables add up to a value."""
        self.require(((one, 1.0) for one in variables), least=value, most=value)

    def solved(
        self, *, seconds: float, gap: float = 0.0, relaxed: bool = False
    ) -> NDArray[np.float64] | None:
        """The best values found, or None where there are none or none were found in time.

        Raises:
            UserError: scipy is not installed.
        """
        solvers = scipy_optimize(self.owner)
        from scipy.sparse import csr_array

        places = [
            (row, column, value)
            for row, (terms, *_) in enumerate(self.rows)
            for column, value in terms.items()
        ]
        rows, columns, values = map(np.asarray, zip(*places, strict=True))
        # Places in 32 bits, as the solver of older releases reads them.
        where = (rows.astype(np.int32), columns.astype(np.int32))
        matrix = csr_array((values, where), shape=(len(self.rows), len(self.costs)))
        least, most = ([row[side] for row in self.rows] for side in (1, 2))
        found = solvers.milp(
            np.asarray(self.costs),
            integrality=np.zeros(len(self.costs)) if relaxed else np.asarray(self.whole, dtype=float),
            bounds=solvers.Bounds(0, np.asarray(self.highest)),
            constraints=solvers.LinearConstraint(matrix, least, most),
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )
        return None if found.x is None else np.asarray(found.x)


def clusters(
    loads: Sequence[float], room: Sequence[int], *, equal: bool, seconds: float, gap: float
) -> list[int] | None:
    """By expert, its cluster, such that the clusters' loads differ least from the mean, added up.

    Args:
        loads: of experts.
        room: how many each cluster gets, or 0 where it stays empty.
        equal: whether clusters get exactly so many; else at least one.
        seconds: after which the best that was found is taken.
        gap: relative distance from the best possible that is good enough.
    """
    program = Program("the placement moetuner")
    num_experts, num_clusters = len(loads), len(room)
    chosen = program.variables(num_experts, num_clusters)
    off = program.variables(num_clusters, cost=1.0, most=_INFINITY, whole=False)
    mean = sum(loads) / num_clusters
    for expert in range(num_experts):
        program.equal(chosen[expert], 1.0)
    for cluster, count in enumerate(room):
        most = float(count) if equal or not count else float(num_experts)
        program.require(
            ((one, 1.0) for one in chosen[:, cluster]),
            least=float(count if equal else min(count, 1)),
            most=most,
        )
        load = list(zip(chosen[:, cluster], loads, strict=True))
        program.require([*load, (off[cluster], -1.0)], most=mean)
        program.require([*load, (off[cluster], 1.0)], least=mean)
    values = program.solved(seconds=seconds, gap=gap)
    return None if values is None else [int(one) for one in values[chosen].argmax(1)]


def seats(
    flows: Sequence[NDArray[np.float64]],
    costs: NDArray[np.float64],
    *,
    one_node: bool,
    relaxed: bool,
    seconds: float,
    gap: float,
) -> list[NDArray[np.float64]] | None:
    """By layer, how much of each cluster sits on each device, such that the slowest pairs take least.

    Args:
        flows: for each two neighbouring layers, tokens from each cluster to each of the next.
        costs: seconds of a token from each device to each other; 0 on one and the same.
        one_node: whether all devices are alike, so that the first layer's may be numbered at will.
        relaxed: whether a cluster may be split over devices.
        seconds: as for `clusters`.
        gap: as for `clusters`.
    """
    program = Program("the placement moetuner")
    num_layers, num_devices = len(flows) + 1, len(costs)
    devices = range(num_devices)
    seat = program.variables(num_layers, num_devices, num_devices)
    slowest = program.variables(len(flows), cost=1.0, most=_INFINITY, whole=False)
    for layer in range(num_layers):
        for one in devices:
            program.equal(seat[layer, one], 1.0)
            program.equal(seat[layer, :, one], 1.0)
    if one_node:
        for one in devices:
            program.equal([seat[0, one, one]], 1.0)
    for layer, flow in enumerate(flows):
        both = program.variables(*(num_devices,) * 4, whole=False)
        for cluster, device, other in np.ndindex(both.shape[:3]):
            pairs = [(one, 1.0) for one in both[cluster, device, other]]
            program.require([*pairs, (seat[layer, cluster, device], -1.0)], least=0.0, most=0.0)
            pairs = [(one, 1.0) for one in both[cluster, :, other, device]]
            program.require([*pairs, (seat[layer + 1, other, device], -1.0)], least=0.0, most=0.0)
        for device, there in np.ndindex(costs.shape):
            if device != there:
                terms = zip(
                    both[:, device, :, there].ravel(), (flow * costs[device, there]).ravel(), strict=True
                )
                program.require([*terms, (slowest[layer], -1.0)], most=0.0)
    values = program.solved(seconds=seconds, gap=gap, relaxed=relaxed)
    return None if values is None else list(values[seat])
