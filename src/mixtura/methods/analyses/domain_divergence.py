"""How differently domains, such as languages, are routed in each layer."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods.analyses import Analysis, Evidence, Report
from mixtura.types.trace import LayerTrace

METHOD = {"paper": 109, "title": "Multilingual Routing in Mixture-of-Experts"}


@final
class DomainDivergence(Analysis):
    """Routing divergence: how far a domain's use of the experts is from the first domain's, layer by layer.

    For each domain the Jensen-Shannon divergence, in bits, of the shares of routing weight that its tokens
    give the experts from those of the first domain: 0 for the same use, 1 for none in common. With a folder
    for each language of parallel texts, the first being English, this is how differently languages are
    routed.

    Shapes:
        A trace of L layers and M domains to L rows of a mean and a largest divergence.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> report = DomainDivergence().measure(Evidence.of(sample_trace(seed=0, num_experts=4)))
        >>> round(report.scalars["mean"], 4)
        0.3031

    Differences from the paper:
        No code was found; the form of the divergence is ours. Weights are those that experts really got, of
        chosen experts only.

    Reference:
        Multilingual Routing in Mixture-of-Experts (paper 109).
    """

    def measure(self, evidence: Evidence) -> Report:
        trace = evidence.trace
        rows: list[dict[str, float | None]] = []
        for layer in trace.layers:
            found = divergences(layer)
            rows.append(
                {
                    "layer": layer.index,
                    "mean": sum(found) / len(found) if found else None,
                    "largest": max(found) if found else None,
                }
            )
        means = [row["mean"] for row in rows if row["mean"] is not None]
        largest = [row["largest"] for row in rows if row["largest"] is not None]
        scalars = {
            "mean": sum(means) / len(means) if means else None,
            "largest": max(largest) if largest else None,
        }
        return Report(scalars, tuple(rows))


def divergences(layer: LayerTrace) -> list[float]:
    """Of each domain but the first, where both were seen."""
    sums = layer.weight_sums.double()
    first, *others = sums
    # What is no number is not seen, either.
    if not bool(first.sum() > 0):
        return []
    return [jensen_shannon(first, other) for other in others if bool(other.sum() > 0)]


def jensen_shannon(first: Float[Tensor, " E"], second: Float[Tensor, " E"]) -> float:
    """The divergence in bits of two distributions, given up to factors.

    >>> jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]))
    1.0
    """
    one, other = first / first.sum(), second / second.sum()
    middle = (one + other) / 2
    nats = torch.special.entr(middle).sum() - (torch.special.entr(one) + torch.special.entr(other)).sum() / 2
    return max(0.0, float(nats / torch.log(torch.tensor(2.0, dtype=nats.dtype))))
