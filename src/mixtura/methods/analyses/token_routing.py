"""Is an expert chosen for the token, or for what it means here?"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.analyses import Analysis, Evidence, Report
from mixtura.methods.analyses._shared import curves_of_layers, generator_of, mean_of, over_layers, ratio
from mixtura.types.trace import Trace

METHOD = {
    "paper": 83,
    "title": "OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models",
    "tags": ["needs:choices"],
}


@final
class TokenRouting(Analysis):
    """Context-independent specialisation: how much of the routing the token's number alone decides.

    ``explained`` is the mutual information of vocabulary entry and expert over the experts' entropy, both
    counted over all choices: 1 where each entry always goes to its own experts. ``by_chance`` is the same
    with the entries shuffled over the text, which is more than 0 in a short text; ``beyond_chance`` is what
    is left of it, 0 to 1. ``top_share`` is the share of an entry's choices that go to its K favourite
    experts, over entries seen ``least`` times or more.

    Of traces of several checkpoints on the same text ``settled`` says how early that is learnt: the share of
    these entries' first favourites that are those of the last checkpoint.

    Shapes:
        A trace of L layers with choices [T, K] to L rows.

    Raises:
        SettingError: a setting is out of range.
        UserError: the trace has no choices or does not say which tokens they are of.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> report = TokenRouting().measure(Evidence.of(sample_trace(seed=0)))
        >>> [round(report.scalars[name], 3) for name in ("explained", "by_chance")]
        [0.044, 0.045]

    Differences from the paper:
        The paper shows pictures of tokens and experts; the numbers, the shuffled baseline and the form of
        ``settled`` are ours. All choices of a token count alike.

    Reference:
        OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models (paper 83).
    """

    def __init__(self, *, least: int = 5, seed: int = 0) -> None:
        check_range("TokenRouting", "least", least, 1, 1 << 30)
        self.least = least
        self.seed = seed

    def measure(self, evidence: Evidence) -> Report:
        trace = evidence.trace
        rows = [self._row(trace, index) for index in (layer.index for layer in trace.layers)]
        names = ("explained", "by_chance", "beyond_chance", "top_share")
        scalars = {name: mean_of(row[name] for row in rows) for name in names}
        figures = over_layers("How much the token decides", "share of the entropy", rows, *names[:2])
        if len(evidence.traces) > 1:
            settled = self._settled(evidence)
            scalars["settled"] = mean_of(points[0][1] for points in settled.values())
            title = "Favourite experts that are already the last checkpoint's"
            figures += curves_of_layers(title, "step", "share of entries", settled)
        return Report(scalars, tuple(rows), figures=figures)

    def _row(self, trace: Trace, index: int) -> dict[str, float | None]:
        table = joint(trace, index)
        ids = trace.vocabulary_entries()
        shuffled = ids[torch.randperm(len(ids), generator=generator_of(self.seed))]
        found, chance = explained(table), explained(joint(trace, index, shuffled))
        beyond = None if found is None or chance is None else ratio(max(0.0, found - chance), 1 - chance)
        often = table[table.sum(1) >= self.least * trace.layer(index).top_k].double()
        favourites = often.topk(min(trace.layer(index).top_k, often.shape[1]), dim=1).values.sum()
        return {
            "layer": index,
            "explained": found,
            "by_chance": chance,
            "beyond_chance": beyond,
            "top_share": ratio(float(favourites), float(often.sum())),
        }

    def _settled(self, evidence: Evidence) -> dict[int, list[tuple[float, float | None]]]:
        """By layer: step, and share of entries whose favourite is already the last checkpoint's."""
        found: dict[int, list[tuple[float, float | None]]] = {}
        for layer in evidence.trace.layers:
            last = joint(evidence.trace, layer.index)
            often = last.sum(1) >= self.least * layer.top_k
            for step, trace in evidence.series()[:-1]:
                same = joint(trace, layer.index).argmax(1)[often] == last.argmax(1)[often]
                share = ratio(float(same.sum()), len(same))
                found.setdefault(layer.index, []).append((step, share))
        return found


def joint(trace: Trace, index: int, ids: Int[Tensor, " T"] | None = None) -> Int[Tensor, "V E"]:
    """How often each vocabulary entry chose each expert of a layer."""
    named = (trace.vocabulary_entries() if ids is None else ids).long()
    num_experts = trace.layer(index).shape.num_experts
    trace.sequences(index)
    choices = trace.layer(index).choices
    assert choices is not None
    width = 1 + int(named.max()) if len(named) else 1
    present = choices < num_experts
    cells = (named[:, None] * num_experts + choices.long())[present]
    return torch.bincount(cells, minlength=width * num_experts).view(width, num_experts)


def explained(table: Int[Tensor, "V E"]) -> float | None:
    """Mutual information of rows and columns over the columns' entropy; None where they have none."""
    shares = table.double() / table.sum().clamp(min=1)

    def entropy(of: Float[Tensor, "*_"]) -> float:
        return float(torch.special.entr(of).sum())

    columns = entropy(shares.sum(0))
    return ratio(entropy(shares.sum(1)) + columns - entropy(shares), columns) if columns > 1e-12 else None
