"""What every placer promises."""

from __future__ import annotations

import torch

from mixtura.authoring.contracts._core import Subject, require
from mixtura.authoring.contracts._samples import sample_cluster, sample_trace
from mixtura.methods import kind
from mixtura.methods.placements import Placer, loads_of
from mixtura.types.placement import Cluster, LayerPlacement, Placement
from mixtura.types.trace import Trace

# Nodes and devices of each: one device, a node, more nodes, more devices than experts, none even.
_SIZES = ((1, 1), (1, 2), (2, 2), (3, 4), (1, 3))


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> tuple[Trace, Cluster]:
    """What text saw of a model of two layers, and four devices in two nodes."""
    del method
    return sample_trace(seed), sample_cluster()


def use(placer: Placer, given: tuple[Trace, Cluster]) -> tuple[Placement, list[LayerPlacement]]:
    """The plan, and what becomes of it in a step."""
    trace, cluster = given
    made = placer.plan(trace, cluster)
    steps = [
        placer.step(at, loads_of(trace, layer, cluster.num_devices), layer.expert_num_bytes, cluster)
        for at, layer in zip(made.layers, trace.layers, strict=True)
    ]
    return made, steps


def check_every_expert_lies_somewhere(method: Subject) -> None:
    """On clusters of any size, each expert of each layer of the trace has a device that exists."""
    trace = sample_trace(4)
    for size in _SIZES:
        cluster = sample_cluster(*size)
        made, steps = use(method.create(), (trace, cluster))
        require(made.num_devices == cluster.num_devices, f"{size}: it is for other devices")
        require(made.source_digest == trace.source_digest, f"{size}: it is for another model")
        for layer, at, then in zip(trace.layers, made.layers, steps, strict=True):
            for one in (at, then):
                require(one.index == layer.index, f"{size}: layers are in another order")
                require(one.num_experts == layer.shape.num_experts, f"{size}: experts are missing")
                last = max(map(max, one.devices))
                require(last < cluster.num_devices, f"{size}: device {last} does not exist")


def check_tags_hold(method: Subject) -> None:
    """Experts are copied, cut or moved in a step only by methods whose tags say so, and sequences split."""
    known = kind("placements").explain
    unknown = [tag for tag in method.header.tags if known(tag) is None]
    require(not unknown, f"the kind has no tag {unknown}")
    for size in _SIZES:
        trace = sample_trace(5, num_experts=4)
        made, steps = use(method.create(), (trace, sample_cluster(*size)))
        for at, then in zip(made.layers, steps, strict=True):
            require(method.has("slices") or at.parts == then.parts == 1, f"{size}: an expert is cut")
            require(method.has("each_step") or at == then, f"{size}: a step changes the plan")
            copied = any(len(held) > one.parts for one in (at, then) for held in one.devices)
            require(method.has("replicates") or not copied, f"{size}: an expert is copied")
        require(method.has("sequences") or not made.groups, f"{size}: sequences are split")


def check_counts_are_equal(method: Subject) -> None:
    """With the tag equal_counts no device owns more experts of a layer than another where that can be."""
    if not method.has("equal_counts"):
        return
    for size in _SIZES:
        made, _ = use(method.create(), (sample_trace(6, num_experts=12), sample_cluster(*size)))
        for layer in made.layers:
            counts = {len(held) for held in layer.held(made.num_devices)}
            require(len(counts) == 1, f"{size}: devices hold {sorted(counts)} experts of 12")


def check_balance(method: Subject) -> None:
    """With the tag balances the busiest device has no more to do than with experts dealt by number."""
    if not method.has("balances"):
        return
    for size in _SIZES:
        trace, cluster = sample_trace(7, num_experts=12), sample_cluster(*size)
        _, steps = use(method.create(), (trace, cluster))
        for layer, then in zip(trace.layers, steps, strict=True):
            loads = loads_of(trace, layer, cluster.num_devices)
            dealt = [(e % cluster.num_devices,) for e in range(12)]
            plain = LayerPlacement(index=layer.index, devices=tuple(dealt))
            least = float(rows_of(plain, loads, cluster).max())
            most = float(rows_of(then, loads, cluster).max())
            require(most <= least * (1 + 1e-9), f"{size}: the busiest has {most:g} rows, dealt {least:g}")


def check_owners_stay(method: Subject) -> None:
    """A step leaves each expert where its numbers lie, whatever the loads, none at all included."""
    cluster = sample_cluster()
    trace = sample_trace(8)
    placer = method.create()
    for at, layer in zip(placer.plan(trace, cluster).layers, trace.layers, strict=True):
        real = loads_of(trace, layer, cluster.num_devices)
        one_hot = torch.zeros_like(real)
        one_hot[0, 3] = 5000.0
        for loads in (real, torch.zeros_like(real), one_hot):
            then = placer.step(at, loads, 1000, cluster)
            same = [at.owner(e) == then.owner(e) for e in range(at.num_experts)]
            require(all(same), "a step moves an expert from its owner")


def check_nothing_seen(method: Subject) -> None:
    """A trace of no text still gives a plan."""
    trace, cluster = sample_trace(9, num_tokens=0), sample_cluster()
    if method.has("sequences"):
        return
    made, _ = use(method.create(), (trace, cluster))
    require(len(made.layers) == len(trace.layers), "layers are missing")


def check_survives_json(method: Subject) -> None:
    """A plan that is written and read again is the same."""
    made, _ = use(method.create(), sample(method, 10))
    require(Placement.from_json(made.to_json()) == made, "the plan is another one when it is read again")


def rows_of(at: LayerPlacement, loads: torch.Tensor, cluster: Cluster) -> torch.Tensor:
    """Rows that each device computes, expert by expert and source by source."""
    rows = torch.zeros(cluster.num_devices, dtype=torch.float64)
    for source in range(len(loads)):
        for expert, devices in enumerate(at.devices):
            groups = [devices[start : start + at.parts] for start in range(0, len(devices), at.parts)]
            parts = at.shares_of(expert)
            if at.near:
                nearest = [one for one in groups if source in one]
                node = cluster.node(source)
                nearest = nearest or [one for one in groups if any(cluster.node(d) == node for d in one)]
                if nearest:
                    groups, parts = nearest, (1 / len(nearest),) * len(nearest)
            for group, share in zip(groups, parts, strict=True):
                for device in group:
                    rows[device] += float(loads[source, expert]) * share / at.parts
    return rows
