"""What several placers compute: experts dealt evenly, and the heaviest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from mixtura.errors import UserError
from mixtura.types.placement import Cluster, LayerPlacement, Placement
from mixtura.types.trace import LayerTrace, Trace


def placed(
    trace: Trace, cluster: Cluster, place: Callable[[LayerTrace], LayerPlacement], **more: Any
) -> Placement:
    """A placement whose layers are made one by one."""
    return Placement(
        source_digest=trace.source_digest,
        num_devices=cluster.num_devices,
        devices_per_node=cluster.devices_per_node,
        layers=tuple(map(place, trace.layers)),
        **more,
    )


def alone(index: int, devices: Sequence[int], **more: Any) -> LayerPlacement:
    """A layer of which each expert lies on one device."""
    return LayerPlacement(index=index, devices=tuple((int(one),) for one in devices), **more)


def places(num_experts: int, num_devices: int) -> list[int]:
    """How many experts each device gets where they are dealt evenly; the first get one more.

    >>> places(7, 3)
    [3, 2, 2]
    """
    each, rest = divmod(num_experts, num_devices)
    return [each + (device < rest) for device in range(num_devices)]


def in_order(num_experts: int, num_devices: int) -> list[int]:
    """By expert, its device where consecutive ones lie together, as many on each.

    >>> in_order(5, 2)
    [0, 0, 0, 1, 1]
    """
    counts = places(num_experts, num_devices)
    return [device for device, count in enumerate(counts) for _ in range(count)]


def placed_in_order(trace: Trace, cluster: Cluster, **more: Any) -> Placement:
    """A placement in which consecutive experts of each layer lie together."""
    return placed(
        trace,
        cluster,
        lambda layer: alone(layer.index, in_order(layer.shape.num_experts, cluster.num_devices)),
        **more,
    )


def heaviest_first(loads: Sequence[float], room: Sequence[int]) -> list[int]:
    """By expert, its device: the heaviest goes first, each to the least busy device that has room.

    >>> heaviest_first([5.0, 4.0, 3.0, 2.0], [2, 2])
    [0, 1, 1, 0]
    """
    left, busy = list(room), [0.0] * len(room)
    found = [0] * len(loads)
    for expert in sorted(range(len(loads)), key=lambda one: (-loads[one], one)):
        # Among devices that are as busy, the one with most room: where nothing is known, counts stay even.
        device = min((d for d in range(len(room)) if left[d]), key=lambda d: (busy[d], -left[d], d))
        found[expert] = device
        left[device] -= 1
        busy[device] += loads[expert]
    return found


def swapped(devices: Sequence[int], cost: Callable[[list[int]], float], most: int = 10_000) -> list[int]:
    """Exchange two experts' devices as long as that makes the cost less, trying at most so many pairs.

    >>> swapped([0, 0, 1, 1], lambda at: sum(abs(a - b) for a, b in zip(at, [1, 0, 0, 1])))
    [1, 0, 0, 1]
    """
    best = list(devices)
    least, tried, better = cost(best), 0, True
    while better and tried < most:
        better = False
        for one in range(len(best)):
            for other in range(one):
                if best[one] == best[other] or tried >= most:
                    continue
                tried += 1
                best[one], best[other] = best[other], best[one]
                found = cost(best)
                if found < least - 1e-9:
                    least, better = found, True
                else:
                    best[one], best[other] = best[other], best[one]
    return best


def scipy_optimize(owner: str) -> ModuleType:
    """scipy's solvers.

    Raises:
        UserError: scipy is not installed.
    """
    try:
        import scipy.optimize
    except ModuleNotFoundError:
        raise UserError(f"{owner} needs scipy: pip install 'mixtura[merge]', or choose another") from None
    found: ModuleType = scipy.optimize
    return found
