"""What a trace says in numbers: how evenly experts are used, and which belong to a domain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods import create
from mixtura.methods.analyses import Evidence, Report
from mixtura.types.trace import LayerTrace, Trace

# Experts seen less often say nothing about where they belong.
_FEWEST_ASSIGNMENTS = 32
_MOST_SPECIALISTS = 20
# A specialist's share of use is at least this many times what an even use by all domains would give.
_CLEARLY = 1.5

Numbers = Mapping[str, float | None]


@final
@dataclass(frozen=True, slots=True)
class Specialist:
    """An expert that one domain uses much more than the others do.

    Attributes:
        layer: number of the decoder layer.
        expert: number of the expert.
        domain: the domain that uses it most.
        share_of_use: share of its use that comes from this domain, all domains weighing the same.
        share_of_tokens: share of this domain's tokens that chose it.
    """

    layer: int
    expert: int
    domain: str
    share_of_use: float
    share_of_tokens: float


@final
@dataclass(frozen=True, slots=True)
class Description:
    """A trace in numbers.

    Attributes:
        trace: what is described.
        load: the analysis "load" over all domains.
        load_by_domain: the same for each domain alone.
        specialisation: per layer, how differently the domains use its experts: 0 alike, 1 disjoint;
            `None` for fewer than two domains with tokens.
        specialists: the experts that belong to one domain most clearly, the clearest first.
    """

    trace: Trace
    load: Report
    load_by_domain: Mapping[str, Report]
    specialisation: tuple[float | None, ...]
    specialists: tuple[Specialist, ...]

    def to_dict(self) -> dict[str, Any]:
        """The description as JSON values, with every expert's assignments by domain."""
        trace = self.trace
        layers = [
            {
                **row,
                "num_experts": layer.shape.num_experts,
                "top_k": layer.top_k,
                "specialisation": special,
                "counts": dict(zip(trace.domains, layer.counts.tolist(), strict=True)),
                "statistics": {name: layer.statistic(name).tolist() for name in layer.statistics},
                "by_domain": {name: dict(self.load_by_domain[name].rows[i]) for name in trace.domains},
            }
            for i, (layer, row, special) in enumerate(
                zip(trace.layers, self.load.rows, self.specialisation, strict=True)
            )
        ]
        domains = [
            {"domain": name, "tokens": tokens, **self.load_by_domain[name].scalars}
            for name, tokens in zip(trace.domains, trace.num_tokens, strict=True)
        ]
        return {
            "source_digest": trace.source_digest,
            "family": trace.model_type,
            "tokens": sum(trace.num_tokens),
            **self.load.scalars,
            "domains": domains,
            "layers": layers,
            "specialists": [asdict(found) for found in self.specialists],
        }


def describe(trace: Trace) -> Description:
    """The numbers of a trace: load over all text and by domain, specialisation, specialists."""
    load = create("analyses", "load")
    return Description(
        trace=trace,
        load=load.measure(Evidence.of(trace)),
        load_by_domain={name: load.measure(Evidence.of(trace.of(name))) for name in trace.domains},
        specialisation=tuple(_specialisation(layer) for layer in trace.layers),
        specialists=_specialists(trace),
    )


def _shares(layer: LayerTrace) -> Float[Tensor, "M E"]:
    """Each domain's assignments as shares over experts, for the domains that have any."""
    counts = layer.counts[layer.counts.sum(1) > 0].double()
    return counts / counts.sum(1, keepdim=True)


def _specialisation(layer: LayerTrace) -> float | None:
    """Jensen-Shannon divergence of the domains' shares over the largest it could be."""
    shares = _shares(layer)
    num_domains = shares.shape[0]
    if num_domains < 2:
        return None
    mixed = _entropy(shares.mean(0))
    return min(1.0, max(0.0, (mixed - _entropy(shares).mean()).item() / math.log(num_domains)))


def _entropy(shares: Float[Tensor, "*any E"]) -> Float[Tensor, "*any"]:
    return -shares.xlogy(shares).sum(-1)


def _specialists(trace: Trace) -> tuple[Specialist, ...]:
    if len(trace.domains) < 2:
        return ()
    tokens = torch.tensor(trace.num_tokens, dtype=torch.float64).clamp(min=1)[:, None]
    found = []
    for layer in trace.layers:
        used = layer.counts.double() / tokens
        shares, domains = (used / used.sum(0).clamp(min=1e-300)).max(0)
        clear = (layer.load >= _FEWEST_ASSIGNMENTS) & (shares * len(trace.domains) >= _CLEARLY)
        for expert in clear.nonzero().flatten().tolist():
            domain = int(domains[expert])
            found.append(
                Specialist(
                    layer=layer.index,
                    expert=expert,
                    domain=trace.domains[domain],
                    share_of_use=shares[expert].item(),
                    share_of_tokens=used[domain, expert].item(),
                )
            )
    found.sort(key=lambda one: (-one.share_of_use, -one.share_of_tokens, one.layer, one.expert))
    return tuple(found[:_MOST_SPECIALISTS])
