"""Which tokens a limit on tokens per expert leaves out: those that come late."""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import check_range
from mixtura.methods.analyses import Analysis, Evidence, Report
from mixtura.methods.analyses._shared import curves_of_layers, mean_of, ratio

METHOD = {
    "paper": 83,
    "title": "OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models",
    "tags": ["needs:choices"],
}


@final
class LateDrops(Analysis):
    """Drop towards the end: what a capacity would drop of each text, by the place in it.

    Choices that were made without a limit are given room again as a capacity would: in each text an expert
    takes ``factor`` times its even share of the choices, rounded up, in the order of the tokens, and the
    others are dropped. ``first`` and ``last`` are the shares dropped in the first and the last of ``parts``
    equal parts of the texts.

    Shapes:
        A trace of L layers with choices [T, K] to L rows.

    Raises:
        SettingError: a setting is out of range.
        UserError: the trace has no choices by sequence.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> report = LateDrops(factor=1.0).measure(Evidence.of(sample_trace(seed=0)))
        >>> [round(report.scalars[name], 3) for name in ("dropped", "first", "last")]
        [0.305, 0.0, 0.667]

    Differences from the paper:
        A replay of choices made without a limit: a model that drops sees other states in later layers. The
        paper drops in groups of several texts; here each text is a group. First and further choices of a
        token stand in one queue.

    Reference:
        OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models (paper 83).
    """

    def __init__(self, *, factor: float = 1.25, parts: int = 10) -> None:
        check_range("LateDrops", "factor", factor, 1e-6, 1e6)
        check_range("LateDrops", "parts", parts, 2, 1000)
        self.factor = factor
        self.parts = parts

    def measure(self, evidence: Evidence) -> Report:
        trace, rows, curves = evidence.trace, [], {}
        for layer in trace.layers:
            sums = torch.zeros(2, self.parts, dtype=torch.float64)
            for choices in trace.sequences(layer.index):
                sums += self._counted(choices, layer.shape.num_experts)
            made, dropped = sums.tolist()
            shares = [ratio(a, b) for a, b in zip(dropped, made, strict=True)]
            rows.append(
                {
                    "layer": layer.index,
                    "dropped": ratio(sum(dropped), sum(made)),
                    "first": shares[0],
                    "last": shares[-1],
                }
            )
            curves[layer.index] = [((part + 0.5) / self.parts, share) for part, share in enumerate(shares)]
        title, place = "Dropped by the place in the text", "place in the text"
        figures = curves_of_layers(title, place, "share dropped", curves)
        scalars = {name: mean_of(row[name] for row in rows) for name in ("dropped", "first", "last")}
        return Report(scalars, tuple(rows), figures=figures)

    def _counted(self, choices: Int[Tensor, "T K"], num_experts: int) -> Float[Tensor, "2 _"]:
        """Choices made, and of these the dropped, by the part of the text."""
        part = torch.arange(len(choices)) * self.parts // max(1, len(choices))
        present = choices < num_experts
        room = math.ceil(self.factor * int(present.sum()) / num_experts)
        hot = F.one_hot(choices.long().clamp(max=num_experts), num_experts + 1)[..., :num_experts]
        before = hot.flatten(0, 1).cumsum(0).view_as(hot) - hot
        late = present & ((before * hot).sum(-1) >= room)
        both = torch.stack([present.sum(1), late.sum(1)]).double()
        return torch.zeros(2, self.parts, dtype=torch.float64).index_add_(1, part, both)
