"""What analyses share: means of what was measured, curves of layers, loads as shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import UserError
from mixtura.methods import _drawing
from mixtura.methods.analyses import Cell, Lines
from mixtura.types.trace import Trace

# Curves of more layers than this cannot be told apart: then the first, the last and some between are shown.
_MOST_CURVES = 6


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of those that are known; None where none is.

    >>> mean_of([1, None, 2]), mean_of([None])
    (1.5, None)
    """
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def ratio(part: float, whole: float) -> float | None:
    """Part over whole; None where the whole is nothing."""
    return part / whole if whole else None


def shown_layers(indices: Sequence[int]) -> tuple[int, ...]:
    """Places of at most six layers, evenly from the first to the last.

    >>> shown_layers(range(3)), shown_layers(range(48))
    ((0, 1, 2), (0, 9, 19, 28, 38, 47))
    """
    if len(indices) <= _MOST_CURVES:
        return tuple(range(len(indices)))
    return tuple(round(i * (len(indices) - 1) / (_MOST_CURVES - 1)) for i in range(_MOST_CURVES))


def curves_of_layers(
    title: str,
    x_label: str,
    y_label: str,
    curves: Mapping[int, Sequence[tuple[float, float | None]]],
    *,
    log_x: bool = False,
) -> tuple[Lines, ...]:
    """A figure of a curve for each of some layers; nothing where there are no points."""
    indices = list(curves)
    picked = [indices[place] for place in shown_layers(indices)]
    series = {f"layer {i}": tuple((x, y) for x, y in curves[i] if y is not None) for i in picked}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ()
    return (Lines(title=title, x_label=x_label, y_label=y_label, series=series, log_x=log_x),)


def over_layers(
    title: str, y_label: str, rows: Sequence[Mapping[str, float | None]], *columns: str
) -> tuple[Lines, ...]:
    """A figure of some columns of the rows over the layers; nothing where they have no numbers."""
    series = {}
    for column in columns:
        points = ((float(row["layer"] or 0), row[column]) for row in rows)
        series[column.replace("_", " ")] = tuple((x, y) for x, y in points if y is not None)
    known = {name: points for name, points in series.items() if points}
    return (Lines(title=title, x_label="layer", y_label=y_label, series=known),) if known else ()


def marks(choices: Int[Tensor, "T K"], num_experts: int) -> Bool[Tensor, "T E"]:
    """Which experts each token has; absent choices are none."""
    ids = choices.long().clamp(max=num_experts)
    return F.one_hot(ids, num_experts + 1).sum(1)[:, :num_experts].bool()


def shares_of(counts: Float[Tensor, " E"] | Int[Tensor, " E"]) -> Float[Tensor, " E"]:
    """Counts over their sum, in float64; all zero where there are none."""
    return counts.double() / counts.sum().clamp(min=1e-300)


def two_domains(trace: Trace, wanted: Sequence[str] = ()) -> tuple[int, int]:
    """The places of two domains: those that are named, else the first two.

    Raises:
        UserError: there are fewer than two, or none of a name.
    """
    named = list(wanted) or list(trace.domains[:2])
    if len(named) != 2 or len(set(named)) != 2 or not set(named) <= set(trace.domains):
        raise UserError(
            f"this analysis tells two sets of texts apart, and the trace has the domains "
            f"{', '.join(trace.domains) or 'none'}; observe a folder with one file or folder for each set, "
            "and name two of them by domains"
        )
    return trace.domains.index(named[0]), trace.domains.index(named[1])


def generator_of(seed: int) -> torch.Generator:
    """Draws that depend on the seed alone."""
    return _drawing.generator_of(seed)


def number_of(row: Mapping[str, Cell], name: str, *, positive: bool = False) -> float:
    """A number of a table's row.

    Raises:
        UserError: it is a word, not finite, or not more than 0 where it must be.
    """
    value = row[name]
    if isinstance(value, str | None) or not math.isfinite(value) or (positive and value <= 0):
        what = "a positive number" if positive else "a number"
        raise UserError(f"{name} must be {what} in every row of the table, got {value!r}")
    return float(value)
