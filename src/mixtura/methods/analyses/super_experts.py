"""Experts with extreme outputs, without which a model breaks."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Bool
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.analyses import Analysis, Evidence, Report
from mixtura.types.trace import Trace

METHOD = {
    "paper": 190,
    "title": "Unveiling Super Experts in Mixture-of-Experts Large Language Models",
    "tags": ["statistic:max_output"],
}


@final
class SuperExperts(Analysis):
    """Super experts: the few whose outputs have extreme values, on which attention sinks rest.

    An expert is one if its largest absolute output value is above the given percentile of all experts'
    and above the given share of the largest, both among the first layers only. `find` gives them as what a
    budget protects, so that any pruner keeps them:
    ``Budget(num_experts=16, protected=SuperExperts().find(trace))``.

    Shapes:
        A trace of L layers to L rows.

    Raises:
        SettingError: a setting is out of range.

    Example:
        >>> from dataclasses import replace
        >>> from mixtura.authoring.contracts import sample_trace
        >>> trace = sample_trace(seed=0)
        >>> trace.layers[0].statistics["max_output"][0, 5] = 1000.0
        >>> SuperExperts().find(trace)
        {0: (5,)}

    Differences from the paper:
        The share of the largest is exact, where its code rounds it down to a whole number. Shared experts
        are not among the experts compared. The number of layers is taken from the last MoE layer.

    Reference:
        Unveiling Super Experts in Mixture-of-Experts Large Language Models (paper 190); its code,
        ZunhaiSu/Super-Experts-Profilling at 573aead, ``eval_utils.py``.
    """

    def __init__(
        self, *, percentile: float = 99.5, share_of_largest: float = 0.1, share_of_layers: float = 0.75
    ) -> None:
        check_range("SuperExperts", "percentile", percentile, 0, 100)
        check_range("SuperExperts", "share_of_largest", share_of_largest, 0, 1)
        check_range("SuperExperts", "share_of_layers", share_of_layers, 0, 1)
        self.percentile = percentile
        self.share_of_largest = share_of_largest
        self.share_of_layers = share_of_layers

    def measure(self, evidence: Evidence) -> Report:
        trace = evidence.trace
        found = self.find(trace)
        rows = []
        for layer in trace.layers:
            largest = layer.statistic("max_output").double()
            seen = bool(layer.load.sum())
            rows.append(
                {
                    "layer": layer.index,
                    "super_experts": len(found.get(layer.index, ())),
                    "largest_output": largest.max().item() if seen else None,
                    "median_output": largest.median().item() if seen else None,
                }
            )
        return Report({"super_experts": sum(map(len, found.values()))}, tuple(rows))

    def find(self, trace: Trace) -> dict[int, tuple[int, ...]]:
        """The super experts by decoder layer; layers without one are absent.

        Raises:
            UserError: the trace has no ``max_output``.
        """
        end = round((1 + max((x.index for x in trace.layers), default=0)) * self.share_of_layers)
        early = [layer for layer in trace.layers if layer.index < end]
        if not early:
            return {}
        outputs = [layer.statistic("max_output").double() for layer in early]
        every = torch.cat(outputs)
        least = torch.quantile(every, self.percentile / 100), every.max() * self.share_of_largest
        above: list[Bool[Tensor, " E"]] = [(one > least[0]) & (one > least[1]) for one in outputs]
        named = {x.index: tuple(m.nonzero().flatten().tolist()) for x, m in zip(early, above, strict=True)}
        return {index: experts for index, experts in named.items() if experts}
