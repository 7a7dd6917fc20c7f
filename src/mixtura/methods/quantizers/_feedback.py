"""Rounding a matrix column by column, each column's error made up for by the columns still to come."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.errors import UserError

# Columns that are rounded one by one before the rest of the matrix is told of them.
BLOCK = 128
# Share of the mean of the moments' diagonal that is added to it; ten times as much where that is too little.
_DAMPING = 0.01
_MOST_DAMPING = 10.0


def check_moments(moments: Float[Tensor, "C C"] | None) -> None:
    """Refuse moments that are no numbers."""
    if moments is not None and not bool(torch.isfinite(moments.diagonal()).all()):
        raise UserError(
            "what a weight matrix is multiplied with on the calibration text holds NaN or infinity; give "
            "text on which the model computes numbers, or look whether its checkpoint is damaged"
        )


# What each thread made last.
_last = threading.local()


@final
class Compensation(NamedTuple):
    """In which order columns are rounded, and what the error of one means for the later ones.

    Attributes:
        order: the columns, those with the largest inputs first.
        factor: above the diagonal, by that order: of what column c is off from its original, column k takes
            over ``factor[c, k]`` times as much. With ones on the diagonal and the fitting D,
            ``factor @ D @ factor.T`` is the matrix of moments.
    """

    order: Int[Tensor, " C"]
    factor: Float[Tensor, "C C"]

    @staticmethod
    def of(moments: Float[Tensor, "C C"] | None, cols: int) -> Compensation:
        """For inputs of these second moments; without any, columns do not make up for each other.

        Raises:
            UserError: they are no numbers.
        """
        check_moments(moments)
        if moments is None or not bool((moments.diagonal() > 0).any()):
            return Compensation(torch.arange(cols), torch.eye(cols))
        # A matrix is rounded to several widths in turn, by the very same moments.
        known = getattr(_last, "made", None)
        if known is None or known[0] is not moments or known[1] != moments._version:
            known = _last.made = (moments, moments._version, _compensation(moments))
        made: Compensation = known[2]
        return made


def _compensation(moments: Float[Tensor, "C C"]) -> Compensation:
    cols = len(moments)
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    # Backwards, so that the triangle that Cholesky's decomposition gives is the upper one.
    backwards = order.flip(0)
    ordered = moments.float().index_select(0, backwards).index_select(1, backwards)
    unit = float(ordered.diagonal().mean())
    damping = _DAMPING
    while damping < _MOST_DAMPING:
        damped = ordered.clone()
        damped.diagonal().add_(damping * unit)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper = lower.flip(0, 1)
            return Compensation(order, (upper / upper.diagonal()).contiguous())
        damping *= 10
    return Compensation(torch.arange(cols), torch.eye(cols))


RoundBlock = Callable[
    [Float[Tensor, "n R"], Float[Tensor, "n R"], Int[Tensor, " n"], Float[Tensor, "n n"]],
    Float[Tensor, "n R"],
]


def round_columns(weight: Float[Tensor, "R C"], compensation: Compensation, round_block: RoundBlock) -> None:
    """Round a matrix a block of columns at a time.

    Args:
        weight: in float32.
        compensation: the order of columns, and what errors mean for later ones.
        round_block: rounds columns one after the other, and passes on errors among them. Called with the
            columns as rows, as earlier ones have changed them and as they were, their numbers in the matrix
            and their part of the factor; returns what each is off from what it was.
    """
    order, factor = compensation
    originals = weight.T[order].contiguous()
    columns = originals.clone()
    # What is handed on is a part of a code's step, of which a 256th does not matter.
    coarse = factor.to(torch.bfloat16)
    for first in range(0, len(order), BLOCK):
        now, later = slice(first, first + BLOCK), slice(first + BLOCK, None)
        left = round_block(columns[now], originals[now], order[now], factor[now, now].contiguous())
        columns[later] += coarse[now, later].T @ left.to(torch.bfloat16)


# Levels nearest to the numbers of a column, given the scale of each of its rows.
Nearest = Callable[[Float[Tensor, " R"], Float[Tensor, " R"]], Float[Tensor, " R"]]


def levels_with_feedback(
    weight: Float[Tensor, "R C"],
    moments: Float[Tensor, "C C"] | None,
    scales: Float[Tensor, "R G"],
    group: int,
    nearest: Nearest,
) -> Float[Tensor, "R C"]:
    """A level for each weight, columns making up for the errors of those before.

    Args:
        weight: in float32.
        moments: of the inputs; without any, columns do not make up for each other.
        scales: of neighbouring columns, chosen before.
        group: how many columns share a scale.
        nearest: the levels there are.
    """
    chosen = torch.empty_like(weight)

    def round_block(columns: Tensor, originals: Tensor, numbers: Tensor, factor: Tensor) -> Tensor:
        left = torch.empty_like(columns)
        for place, column in enumerate(columns):
            scale = scales[:, numbers[place] // group]
            level = nearest(column, scale)
            chosen[:, numbers[place]] = level
            left[place] = originals[place] - level * scale
            columns[place + 1 :] += factor[place, place + 1 :, None] * left[place]
        return left

    round_columns(weight, Compensation.of(moments, weight.shape[1]), round_block)
    return chosen


def fitted_scales(
    weight: Float[Tensor, "R C"],
    levels: Float[Tensor, "R C"],
    moments: Float[Tensor, "C C"] | None,
    scales: Float[Tensor, "R G"],
    group: int,
) -> Float[Tensor, "R G"]:
    """The scales with which given levels lose least: least squares in the outputs, row by row.

    Args:
        weight: what the levels stand for.
        levels: before they are scaled.
        moments: of the inputs; None for inputs that do not depend on each other.
        scales: kept where the levels of a row leave a scale open.
        group: neighbouring columns that share a scale.
    """
    rows, cols = weight.shape
    num_groups = scales.shape[1]
    wide = levels.float()
    left = torch.zeros(rows, num_groups, num_groups)
    if moments is None:
        wanted = wide * weight
        left.diagonal(dim1=1, dim2=2).copy_(_by_group(wide * wide, group).sum(-1))
    else:
        # Not in bfloat16: where one input dwarfs the others, nearly all of a product is to cancel.
        whole = moments.float()
        wanted = wide * (weight @ whole)
        for number, first in enumerate(range(0, cols, group)):
            part = wide[:, first : first + group] @ whole[first : first + group]
            left[:, number] = _by_group(wide * part, group).sum(-1)
    right = _by_group(wanted, group).sum(-1)
    size = left.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    # Towards the scales there were: rows of few levels do not say more.
    ridge = 1e-4 * size * torch.eye(num_groups)
    right = right + (ridge @ scales[..., None]).squeeze(-1)
    solved, failed = torch.linalg.solve_ex(left + ridge, right)
    usable = (failed == 0) & torch.isfinite(solved).all(-1) & (size.flatten() > 0)
    return torch.where(usable[:, None], solved, scales)


def _by_group(values: Float[Tensor, "R C"], group: int) -> Float[Tensor, "R G g"]:
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % group))
    return padded.view(values.shape[0], -1, group)
