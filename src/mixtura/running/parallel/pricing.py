"""What a placement is predicted to cost in time, bytes and memory, before anything is rented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UserError, check_range
from mixtura.methods.placements import Placer, loads_of
from mixtura.running.parallel.traffic import Numbers, Traffic, traffic_of
from mixtura.types.placement import Cluster, LayerPlacement, Link, Placement
from mixtura.types.trace import LayerTrace, Trace

Hop = Literal["all", "between", "within"]
FLAT: tuple[Hop, ...] = ("all",)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step of each device is.

    Attributes:
        tokens_per_device: tokens of a device in a step.
        num_bytes: of a number in weights and tokens.
        training: forward and backward pass and an optimizer, or a forward pass alone.
        state_num_bytes: that training keeps for a parameter beside weight and gradient: two moments and a
            copy in 32 bits.
        other_num_parameters: of the model outside its experts; each device has them all.

    Raises:
        SettingError: a number is out of range.
    """

    tokens_per_device: int = 4096
    num_bytes: int = 2
    training: bool = True
    state_num_bytes: int = 12
    other_num_parameters: int = 0

    def __post_init__(self) -> None:
        check_range("Work", "tokens_per_device", self.tokens_per_device, 1, 1 << 40)
        check_range("Work", "num_bytes", self.num_bytes, 1, 8)
        check_range("Work", "other_num_parameters", self.other_num_parameters, 0, 1 << 60)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a step is predicted to take.

    Attributes:
        step_s: seconds; parts below follow each other, nothing overlaps.
        expert_s: of them, the busiest device's experts in each layer.
        exchange_s: sending tokens to experts and back.
        copy_s: sending copies of experts, and their gradients back.
        other_s: what is outside of the experts, and adding up its gradients.
        idle_share: of all devices' time, what they neither compute.
        busiest: rows of the busiest device over the mean, averaged over layers by rows.
        within_num_bytes: that all devices send over links in nodes.
        between_num_bytes: that all devices send between nodes.
        num_messages: that one device sends at most.
        memory_num_bytes: of the device that needs most.
        fits: whether that is there.
    """

    step_s: float
    expert_s: float
    exchange_s: float
    copy_s: float
    other_s: float
    idle_share: float
    busiest: float
    within_num_bytes: float
    between_num_bytes: float
    num_messages: int
    memory_num_bytes: float
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """The price as JSON values."""
        return asdict(self)


def price(
    placement: Placement,
    trace: Trace,
    cluster: Cluster,
    work: Work,
    *,
    placer: Placer | None = None,
    hops: Sequence[Hop] = FLAT,
    kept: float = 1.0,
) -> Price:
    """What a step costs with experts placed so, if text is like that of a trace.

    Args:
        placement: where experts lie.
        trace: how busy experts are; scaled to ``work.tokens_per_device``.
        cluster: devices and links.
        work: what a step is.
        placer: the method that made it, where it chooses copies in each step.
        hops: in what steps rows go to their device.
        kept: share of rows that an exchange sends, where it compresses.

    Raises:
        UserError: the placement is for another number of devices or other layers.
    """
    if (placement.num_devices, placement.devices_per_node) != (cluster.num_devices, cluster.devices_per_node):
        raise UserError(
            f"this placement is for {placement.num_devices} devices, in nodes of "
            f"{placement.devices_per_node}; the cluster has {cluster.num_devices} in nodes of "
            f"{cluster.devices_per_node}; plan again"
        )
    parts = []
    for layer in trace.layers:
        loads = scaled_loads(trace, layer, cluster.num_devices, work.tokens_per_device)
        owned = placement.layer(layer.index)
        at = owned if placer is None else placer.step(owned, loads, expert_num_bytes(layer, work), cluster)
        parts.append(_of_layer(at, layer, loads, cluster, work, hops, kept))
    return _summed(parts, cluster, work)


def expert_num_bytes(layer: LayerTrace, work: Work) -> int:
    """Bytes of an expert of three matrices."""
    return 3 * layer.shape.d_model * layer.shape.d_expert * work.num_bytes


def scaled_loads(
    trace: Trace, layer: LayerTrace, num_devices: int, tokens_per_device: int
) -> Float[Tensor, "P E"]:
    """Assignments by device and expert in a step, if text is like that of a trace.

    A trace without any assignment says that all experts are as busy.
    """
    loads = loads_of(trace, layer, num_devices)
    total = float(loads.sum())
    wanted = num_devices * tokens_per_device * layer.top_k
    return torch.full_like(loads, wanted / loads.numel()) if total == 0 else loads * (wanted / total)


@final
@dataclass(frozen=True, slots=True)
class _Part:
    """One layer's seconds, bytes and rows."""

    expert_s: float
    mean_expert_s: float
    exchange_s: float
    copy_s: float
    bytes_by_link: Numbers
    num_messages: int
    computed: Numbers
    memory: Numbers


def _of_layer(
    at: LayerPlacement,
    layer: LayerTrace,
    loads: Tensor,
    cluster: Cluster,
    work: Work,
    hops: Sequence[Hop],
    kept: float,
) -> _Part:
    traffic = traffic_of(at, loads, cluster)
    row_num_bytes = layer.shape.d_model * work.num_bytes * kept
    ways = 4 if work.training else 2
    seconds, by_link, messages = exchanged(traffic, cluster, row_num_bytes, hops)
    flops = 6 * layer.shape.d_model * layer.shape.d_expert * (3 if work.training else 1)
    busy = traffic.computed * kept * flops / cluster.flops_per_s
    size = expert_num_bytes(layer, work) / at.parts
    copy_s, copied = _copied(at, size, cluster)
    copies = 2 if work.training else 1
    return _Part(
        expert_s=float(busy.max()),
        mean_expert_s=float(busy.mean()),
        exchange_s=ways * seconds,
        copy_s=copies * copy_s,
        bytes_by_link=ways * by_link + copies * copied,
        num_messages=ways * messages,
        computed=traffic.computed,
        memory=_memory(at, layer, traffic, cluster, work),
    )


def exchanged(
    traffic: Traffic, cluster: Cluster, row_num_bytes: float, hops: Sequence[Hop]
) -> tuple[float, Numbers, int]:
    """Seconds of one way, bytes over links in nodes and between them, and messages of a device."""
    within = _time(traffic.sent[0], traffic.received[0], cluster.within, row_num_bytes)
    between = _time(traffic.sent[1], traffic.received[1], cluster.between, row_num_bytes)
    inside, outside = cluster.devices_per_node - 1, cluster.num_devices - cluster.devices_per_node
    if tuple(hops) == FLAT:
        waiting = inside * cluster.within.latency_s + outside * cluster.between.latency_s
        by_link = traffic.sent.sum(1) * row_num_bytes
        return float((within + between).max()) + waiting, by_link, inside + outside
    # Rows change node between devices of the same place, and place inside whichever node.
    turned = _time(traffic.turned[0], traffic.turned[1], cluster.within, row_num_bytes)
    others = cluster.num_nodes - 1
    waiting = inside * cluster.within.latency_s + others * cluster.between.latency_s
    by_link = np.array([traffic.turned[0].sum(), traffic.sent[1].sum()]) * row_num_bytes
    return float(turned.max() + between.max()) + waiting, by_link, inside + others


def _time(sent: Numbers, received: Numbers, link: Link, row_num_bytes: float) -> Numbers:
    time: Numbers = np.maximum(sent, received) * (row_num_bytes / link.bytes_per_s)
    return time


def _copied(at: LayerPlacement, size: float, cluster: Cluster) -> tuple[float, Numbers]:
    """Seconds of sending experts from their owners to the other devices, and the bytes by link."""
    sent = np.zeros((2, cluster.num_devices))
    received = np.zeros_like(sent)
    for held in at.devices:
        for place, device in enumerate(held):
            owner = held[place % at.parts]
            if device != owner:
                side = int(cluster.node(device) != cluster.node(owner))
                sent[side, owner] += size
                received[side, device] += size
    links = (cluster.within, cluster.between)
    seconds = [_time(sent[side], received[side], link, 1.0) for side, link in enumerate(links)]
    return float(np.sum(seconds, axis=0).max()), sent.sum(1)


def _memory(at: LayerPlacement, layer: LayerTrace, traffic: Traffic, cluster: Cluster, work: Work) -> Numbers:
    """Bytes of a layer's experts on each device, and of the rows that are there."""
    owned, copies = np.zeros(cluster.num_devices), np.zeros(cluster.num_devices)
    for held in at.devices:
        np.add.at(owned, np.array(held[: at.parts]), 1.0)
        np.add.at(copies, np.array(held[at.parts :], dtype=int), 1.0)
    numbers = expert_num_bytes(layer, work) / work.num_bytes / at.parts
    weight = work.num_bytes * (2 if work.training else 1)
    state = work.state_num_bytes if work.training else 0
    # A row as it comes and as it goes, and its three hidden vectors; all are kept for the backward pass.
    rows = (2 * layer.shape.d_model + 3 * layer.shape.d_expert / at.parts) * work.num_bytes
    found: Numbers = numbers * (owned * (weight + state) + copies * weight) + traffic.computed * rows
    return found


def _summed(parts: Sequence[_Part], cluster: Cluster, work: Work) -> Price:
    expert_s, exchange_s, copy_s, mean_s = (
        sum(getattr(one, name) for one in parts)
        for name in ("expert_s", "exchange_s", "copy_s", "mean_expert_s")
    )
    passes = 3 if work.training else 1
    others = work.other_num_parameters
    other_compute_s = 2 * others * work.tokens_per_device * passes / cluster.flops_per_s
    other_s = other_compute_s + (_reduced(others * work.num_bytes, cluster) if work.training else 0.0)
    step_s = expert_s + exchange_s + copy_s + other_s
    by_link = sum((one.bytes_by_link for one in parts), np.zeros(2))
    rows = sum(float(one.computed.sum()) for one in parts)
    most = sum(float(one.computed.max()) for one in parts)
    each = others * (2 * work.num_bytes + work.state_num_bytes if work.training else work.num_bytes)
    memory = float(sum((one.memory for one in parts), np.zeros(cluster.num_devices)).max()) + each
    return Price(
        step_s=step_s,
        expert_s=expert_s,
        exchange_s=exchange_s,
        copy_s=copy_s,
        other_s=other_s,
        idle_share=1 - (mean_s + other_compute_s) / step_s if step_s else 0.0,
        busiest=most * cluster.num_devices / rows if rows else 1.0,
        within_num_bytes=float(by_link[0]),
        between_num_bytes=float(by_link[1]),
        num_messages=sum(one.num_messages for one in parts),
        memory_num_bytes=memory,
        fits=memory <= cluster.memory_num_bytes,
    )


def _reduced(num_bytes: float, cluster: Cluster) -> float:
    """Seconds of adding up as many bytes of gradients over all devices, in a ring."""
    if cluster.num_devices == 1:
        return 0.0
    link = cluster.between if cluster.num_nodes > 1 else cluster.within
    steps = 2 * (cluster.num_devices - 1)
    return steps * (num_bytes / cluster.num_devices / link.bytes_per_s + link.latency_s)
