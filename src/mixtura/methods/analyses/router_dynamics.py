"""When routers settle, how much they still change, and how many experts they use."""

from __future__ import annotations

from typing import final

from jaxtyping import Bool
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.analyses import Analysis, Evidence, Lines, Report, Table
from mixtura.methods.analyses._shared import curves_of_layers, marks, mean_of, ratio
from mixtura.types.trace import LayerTrace

METHOD = {
    "paper": 128,
    "title": "On DeepSeekMoE: Statistical Benefits of Shared Experts and Normalized Sigmoid Gating",
    "tags": ["needs:choices", "needs:series"],
}


@final
class RouterDynamics(Analysis):
    """Router saturation, change rate and expert utilisation over the checkpoints of a training.

    All on the same text, for each layer and checkpoint: ``saturation`` is the share of a token's experts that
    are those of the last checkpoint, ``change`` the share that are not those of the checkpoint before, and
    ``utilisation`` the share of experts whose load is more than ``floor`` times the mean. The rows give the
    saturation of the first checkpoint, and the change and utilisation of the last.

    Shapes:
        Traces of C checkpoints with choices [T, K] of L layers to L rows, and a table of C.

    Raises:
        SettingError: ``floor`` is out of range.
        UserError: there are fewer than two traces, or they are of other layers or other text.

    Example:
        >>> from mixtura.authoring.contracts import sample_trace
        >>> traces = [sample_trace(seed=seed) for seed in (0, 1, 1)]
        >>> report = RouterDynamics().measure(Evidence(traces=tuple(traces), steps=(0, 50, 100)))
        >>> round(report.scalars["saturation"], 3), report.scalars["change"], report.scalars["utilisation"]
        (0.376, 0.0, 1.0)

    Differences from the paper:
        Its abstract alone was read; the definitions are those of OLMoE (saturation) and ours (change,
        utilisation). Its theorems on how fast experts are estimated are not checked here.

    Reference:
        On DeepSeekMoE: Statistical Benefits of Shared Experts and Normalized Sigmoid Gating (paper 128).
    """

    def __init__(self, *, floor: float = 0.1) -> None:
        check_range("RouterDynamics", "floor", floor, 0, 1)
        self.floor = floor

    def measure(self, evidence: Evidence) -> Report:
        series = evidence.series()
        found: dict[str, dict[int, list[tuple[float, float | None]]]] = {
            name: {} for name in ("saturation", "change", "utilisation")
        }
        for layer in evidence.trace.layers:
            made = [_all_marks(evidence, place, layer) for place in range(len(series))]
            for place, (step, trace) in enumerate(series):
                values = {
                    "saturation": _shared(made[place], made[-1]),
                    "change": _left(made[place], made[place - 1]) if place else None,
                    "utilisation": self._used(trace.layer(layer.index)),
                }
                for name, value in values.items():
                    found[name].setdefault(layer.index, []).append((step, value))
        rows = [
            {
                "layer": layer.index,
                "saturation": found["saturation"][layer.index][0][1],
                "change": found["change"][layer.index][-1][1],
                "utilisation": found["utilisation"][layer.index][-1][1],
            }
            for layer in evidence.trace.layers
        ]
        table = Table(
            title="By checkpoint, the mean of all layers",
            columns=("step", *found),
            rows=tuple(
                (step, *(mean_of(points[place][1] for points in one.values()) for one in found.values()))
                for place, (step, _) in enumerate(series)
            ),
        )
        figures: tuple[Lines, ...] = ()
        for name, one in found.items():
            figures += curves_of_layers(name.capitalize(), "step", name, one)
        scalars = {name: mean_of(row[name] for row in rows) for name in found}
        return Report(scalars, tuple(rows), tables=(table,), figures=figures)

    def _used(self, layer: LayerTrace) -> float | None:
        load = layer.load.double()
        return ratio(float((load > self.floor * load.mean()).sum()), len(load)) if bool(load.sum()) else None


def _all_marks(evidence: Evidence, place: int, layer: LayerTrace) -> list[Bool[Tensor, "_ E"]]:
    sequences = evidence.traces[place].sequences(layer.index)
    return [marks(choices, layer.shape.num_experts) for choices in sequences]


def _shared(one: list[Bool[Tensor, "_ E"]], other: list[Bool[Tensor, "_ E"]]) -> float | None:
    """The share of one's choices that the other makes, too."""
    both = sum(int((a & b).sum()) for a, b in zip(one, other, strict=True))
    return ratio(both, sum(int(a.sum()) for a in one))


def _left(one: list[Bool[Tensor, "_ E"]], before: list[Bool[Tensor, "_ E"]]) -> float | None:
    """The share of one's choices that were not made before."""
    same = _shared(one, before)
    return None if same is None else 1 - same
