"""`mixtura plan`: placements side by side, what each costs, and a picture of what goes where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

from mixtura import __version__
from mixtura.checkpoints.summary import ModelSummary
from mixtura.errors import UserError
from mixtura.methods import create, header
from mixtura.methods.placements import Placer
from mixtura.report import Html, Section, heatmap_svg, human_number, page, paragraph, table_html
from mixtura.report.units import format_bytes
from mixtura.running.parallel.pricing import FLAT, Hop, Price, Work, expert_num_bytes, price, scaled_loads
from mixtura.running.parallel.traffic import Numbers, between_devices
from mixtura.types import LayerShape
from mixtura.types.placement import Cluster, Placement
from mixtura.types.trace import LayerTrace, Trace

# More devices than that are shown node by node.
_MOST_SHOWN = 64
COLUMNS = (
    "placement", "step", "experts", "exchange", "copies", "other", "idle", "busiest", "in nodes",
    "between nodes", "memory",
)  # fmt: skip


@final
@dataclass(frozen=True, slots=True)
class Option:
    """One placement and its price, or why there is none."""

    name: str
    placement: Placement | None
    price: Price | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The option as JSON values, without the placement itself."""
        return {
            "placement": self.name,
            "why": self.reason,
            "price": None if self.price is None else self.price.to_dict(),
        }


def even_trace(summary: ModelSummary) -> Trace:
    """A trace that says nothing but a model's sizes: all its experts are as busy."""
    return trace_of_sizes(
        [(one.index, one.d_model, one.d_expert, one.num_experts, one.top_k) for one in summary.layers],
        model_type=summary.family,
        groups={one.index: (one.num_groups, one.top_groups) for one in summary.layers},
    )


def trace_of_sizes(
    sizes: Sequence[tuple[int, int, int, int, int]],
    *,
    model_type: str = "",
    groups: Mapping[int, tuple[int, int]] | None = None,
) -> Trace:
    """A trace without text, of layers given as (index, D, F, E, K)."""
    layers = []
    for index, d_model, d_expert, num_experts, top_k in sizes:
        num_groups, top_groups = (groups or {}).get(index, (1, 1))
        layers.append(
            LayerTrace(
                index=index,
                shape=LayerShape(d_model, d_expert, num_experts),
                top_k=top_k,
                num_groups=num_groups,
                top_groups=top_groups,
                expert_num_bytes=0,
                counts=torch.zeros(1, num_experts, dtype=torch.int64),
                weight_sums=torch.zeros(1, num_experts),
            )
        )
    return Trace(
        source_digest="", model_type=model_type, domains=("",), num_tokens=(0,), layers=tuple(layers)
    )


def check_same_model(trace: Trace, summary: ModelSummary) -> None:
    """Refuse a trace of a model of other sizes.

    Raises:
        UserError: layers or experts differ.
    """
    seen = [(one.index, one.shape.num_experts, one.top_k) for one in trace.layers]
    there = [(one.index, one.num_experts, one.top_k) for one in summary.layers]
    if seen != there:
        raise UserError(
            "the trace is of another model: its layers with experts are not this model's in number, experts "
            "or choices a token; observe this model with `mixtura observe --save`"
        )


def compare(
    names: Sequence[str],
    trace: Trace,
    cluster: Cluster,
    work: Work,
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    hops: Sequence[Hop] = FLAT,
    strict: bool = False,
) -> tuple[Option, ...]:
    """Placements and prices, the shortest step first; those that cannot be at the end.

    Raises:
        UserError: ``strict``, and one cannot be.
    """
    found = []
    for name in names:
        placer: Placer = create("placements", name, **(settings or {}).get(name, {}))
        try:
            made = placer.plan(trace, cluster)
            cost = price(made, trace, cluster, work, placer=placer, hops=hops)
        except UserError as error:
            if strict:
                raise
            found.append(Option(name, None, None, str(error)))
            continue
        found.append(Option(name, made, cost, header("placements", name).summary))

    def order(one: Option) -> tuple[bool, bool, float]:
        fits = one.price is not None and one.price.fits
        return one.price is None, not fits, one.price.step_s if one.price else 0.0

    return tuple(sorted(found, key=order))


def cells(option: Option) -> list[str]:
    """A row of the table."""
    cost = option.price
    if cost is None:
        return [option.name, *["–"] * (len(COLUMNS) - 1)]
    times = (cost.step_s, cost.expert_s, cost.exchange_s, cost.copy_s, cost.other_s)
    return [
        option.name,
        *(f"{1000 * one:.3g} ms" for one in times),
        f"{100 * cost.idle_share:.0f} %",
        f"{cost.busiest:.2f} x",
        format_bytes(cost.within_num_bytes),
        format_bytes(cost.between_num_bytes),
        format_bytes(cost.memory_num_bytes) + ("" if cost.fits else " (too much)"),
    ]


def traffic_grid(option: Option, trace: Trace, cluster: Cluster, work: Work, **settings: Any) -> Numbers:
    """Bytes from each device to each other in a pass over all layers; by node where there are many."""
    assert option.placement is not None
    placer: Placer = create("placements", option.name, **settings)
    total: Numbers = np.zeros((cluster.num_devices, cluster.num_devices))
    for layer in trace.layers:
        loads = scaled_loads(trace, layer, cluster.num_devices, work.tokens_per_device)
        owned = option.placement.layer(layer.index)
        at = placer.step(owned, loads, expert_num_bytes(layer, work), cluster)
        total += between_devices(at, loads, cluster) * (layer.shape.d_model * work.num_bytes)
    if cluster.num_devices <= _MOST_SHOWN:
        return total
    nodes, each = cluster.num_nodes, cluster.devices_per_node
    by_node: Numbers = total.reshape(nodes, each, nodes, each).sum((1, 3))
    return by_node


def plan_page(options: Sequence[Option], grids: Mapping[str, Numbers], said: str) -> str:
    """A page with the table and, for each placement that can be, a picture of the traffic."""
    table = table_html(COLUMNS, [cells(one) for one in options], highlight=(0,))
    sections = [Section("What each placement costs", [paragraph(said), table])]
    most = max((float(grid.max()) for grid in grids.values()), default=0.0)
    for one in options:
        if one.name in grids:
            sections.append(Section(one.name, [paragraph(one.reason), _picture(grids[one.name], most)]))
        elif one.price is None:
            sections.append(Section(one.name, [paragraph(one.reason)]))
    return page("Where experts lie", sections, footer=f"mixtura {__version__}")


def _picture(grid: Numbers, most: float) -> Html:
    labels = [str(number) for number in range(len(grid))]
    return heatmap_svg(
        grid.tolist(),
        labels,
        labels,
        title="Bytes of tokens from each device (rows) to each other, one way, one pass",
        row_name="from",
        col_name="to",
        low=0.0,
        high=most,
        number_format=human_number,
    )
