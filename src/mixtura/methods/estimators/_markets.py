"""Windows of returns: in words, what simple rules make of them, and what positions come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.errors import UserError

OUTLOOKS: Final = ("optimistic", "pessimistic")
RULES: Final = ("trend", "reversal", "breakout", "positioning")
# Of a window's way that led somewhere, above which it is said to have a trend.
_DIRECT = 0.3


def outlook(X: Float[np.ndarray, "n L"]) -> np.ndarray:
    """Optimistic where a window gained, pessimistic where it lost."""
    return np.where(X.sum(1) > 0, *OUTLOOKS)


def described(X: Float[np.ndarray, "n L"], news: Sequence[str] | None) -> list[str]:
    """Each window of returns in words, with its news, as a question to a language model.

    Raises:
        UserError: there is not one text a row.
    """
    if news is not None and len(news) != len(X):
        raise UserError(f"news must be one text a row, {len(X)} in all, got {len(news)}")
    made = []
    for number, row in enumerate(X):
        moves = ", ".join(f"{100 * value:+.2f} %" for value in row)
        told = [] if news is None else [f"News: {news[number]}"]
        ask = "How is the outlook for the next period?"
        made.append("\n".join([f"Returns so far, oldest first: {moves}.", *told, ask, _ANSWER]))
    return made


_ANSWER = f"Answer with one word, {OUTLOOKS[0]} or {OUTLOOKS[1]}."


def log_wealth(positions: Float[np.ndarray, " n"], returns: Float[np.ndarray, " n"], cost: float) -> float:
    """The logarithm of what 1 becomes, period by period, where each change of position costs a part of it.

    >>> round(log_wealth(np.array([1.0, 0.0]), np.array([0.1, -0.5]), cost=0.0), 4)
    0.0953
    """
    changes = np.abs(np.diff(positions, prepend=0.0))
    growth = (1 + positions * returns) * (1 - cost * changes)
    return float(np.log(np.maximum(growth, 1e-12)).sum())


def rule_positions(x: Float[Tensor, "T L"], usual: Float[Tensor, ""]) -> Float[Tensor, "T R"]:
    """What part of the money each rule puts in: trend, reversal, breakout, positioning.

    Args:
        x: windows of returns.
        usual: the deviation within a window that is usual.
    """
    level = x.cumsum(1)
    high = torch.cat([torch.zeros_like(level[:, :1]), level[:, :-1]], 1).amax(1)
    trend = (level[:, -1] > 0).to(x.dtype)
    reversal = (x[:, -1] < x.mean(1)).to(x.dtype)
    breakout = (level[:, -1] > high).to(x.dtype)
    spread = x.std(1, correction=0).clamp(min=1e-12)
    return torch.stack([trend, reversal, breakout, (usual / spread).clamp(max=1.0)], dim=1)


def regimes(x: Float[Tensor, "T L"]) -> Int[Tensor, " T"]:
    """The rule that is made for the regime that a window shows, by number.

    A new high is a breakout; else a window that went somewhere is a trend if it rose, and a case for careful
    positioning if it fell; one that went to and fro is for reversal.
    """
    level = x.cumsum(1)
    high = torch.cat([torch.zeros_like(level[:, :1]), level[:, :-1]], 1).amax(1)
    direct = level[:, -1].abs() > _DIRECT * x.abs().sum(1)
    went = torch.where(level[:, -1] > 0, RULES.index("trend"), RULES.index("positioning"))
    found = torch.where(direct, went, RULES.index("reversal"))
    new_high = direct & (level[:, -1] > high) & (x[:, -1] > 0)
    return torch.where(new_high, RULES.index("breakout"), found)
