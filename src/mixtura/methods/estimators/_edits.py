"""Small errors put into rows that are right: other numbers, operators, exchanges, omissions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import SettingError

EDITS: Final = ("number", "related", "operator", "swap", "deletion")
# A column of so few values holds a choice, such as an operator.
_FEW: Final = 8
# A number moves by at least this share of the most that it may.
_LEAST_MOVE: Final = 0.2

Rows = Float[np.ndarray, "n d"]


def checked(kinds: Sequence[str] | None, columns: Sequence[int] | None, num: int) -> list[str]:
    """The kinds of edits that are named, or all.

    Raises:
        SettingError: there is no such kind, or no such column.
    """
    if kinds is not None and not (kinds and set(kinds) <= set(EDITS)):
        raise SettingError(f"edits of Rise must be among {', '.join(EDITS)}, got {list(kinds)}")
    if columns is not None and not (columns and all(0 <= c < num for c in columns)):
        raise SettingError(f"columns of Rise must be from 0 to {num - 1}, got {list(columns)}")
    return list(EDITS if kinds is None else kinds)


@final
class Editor:
    """Draws rows that differ from right ones in one number or two, and are not told by these alone.

    Every number of an edit lies within what its column had in right rows; an edit that changes nothing, or
    that is a right row itself, is dropped.

    Args:
        right: rows that are right.
        size: the most that `number` moves a number by, in deviations of its column.
        columns: those that may be edited; None means all.
    """

    def __init__(self, right: Rows, size: float, columns: Sequence[int] | None = None) -> None:
        self.values = [np.unique(column) for column in right.T]
        self.low, self.high = right.min(0), right.max(0)
        self.reach = size * right.std(0)
        self.known = {row.tobytes() for row in right + 0.0}
        self.columns = np.arange(right.shape[1]) if columns is None else np.asarray(columns, dtype=int)

    def edit(
        self, rows: Rows, kinds: Sequence[str], draw: np.random.Generator
    ) -> tuple[Rows, Bool[np.ndarray, " n"]]:
        """An edit of each row, of a kind that is drawn; and whether it is one to learn from."""
        made = rows + 0.0
        for place, kind in enumerate(draw.choice(list(kinds), len(rows))):
            self._change(made[place], str(kind), draw)
        inside = ((made >= self.low) & (made <= self.high)).all(1)
        told = np.array([row.tobytes() in self.known for row in made], dtype=bool)
        return made, inside & ~told & (made != rows).any(1)

    def _change(self, row: Float[np.ndarray, " d"], kind: str, draw: np.random.Generator) -> None:
        column, other = draw.choice(self.columns, 2, replace=len(self.columns) < 2).tolist()
        if kind == "number":
            move = self.reach[column] * draw.uniform(_LEAST_MOVE, 1) * draw.choice([-1, 1])
            row[column] = self._moved(column, float(row[column]), float(move))
        elif kind == "related":
            row[column] = row[other]
        elif kind == "swap":
            row[[column, other]] = row[[other, column]]
        elif kind == "deletion":
            row[column] = 0.0
        else:
            choices = [c for c in self.columns if 1 < len(self.values[c]) <= _FEW]
            if choices:
                column = draw.choice(choices)
                others = self.values[column][self.values[column] != row[column]]
                row[column] = draw.choice(others)

    def _moved(self, column: int, value: float, move: float) -> float:
        """The column's own value that is nearest to the one moved to, and at least the next that way."""
        values = self.values[column]
        beyond = values[values > value] if move > 0 else values[values < value]
        if not len(beyond):
            return value
        return float(beyond[np.abs(beyond - (value + move)).argmin()])


def preference(ahead: Float[Tensor, " P"], before: Float[Tensor, " P"], beta: float) -> Float[Tensor, ""]:
    """DPO's loss of pairs: how far the better one is ahead now, beside how far the reference had it ahead."""
    return -F.logsigmoid(beta * (ahead - before)).mean()


def pairs(
    right: Float[Tensor, "R D"], wrong: Float[Tensor, "W D"], edits: list[Tensor]
) -> tuple[Float[Tensor, "P D"], Float[Tensor, "P D"]]:
    """What is preferred and to what: each right row to its edits, and as often to a wrong row drawn."""
    rivals = [*edits, *(wrong[torch.randint(len(wrong), (len(right),))] for _ in range(max(len(edits), 1)))]
    worse = torch.cat(rivals)
    there = ~worse.isnan().any(1)
    return right.repeat(len(rivals), 1)[there], worse[there]


def line_of(better: Float[Tensor, " P"], worse: Float[Tensor, " P"]) -> Float[np.ndarray, "2"]:
    """Slope and height of the line that makes scores into log odds of being the better one."""
    from sklearn.linear_model import LogisticRegression

    scores = torch.cat([better, worse]).numpy()[:, None]
    fitted = LogisticRegression().fit(scores, np.repeat([1, 0], len(better)))
    return np.array([max(float(fitted.coef_[0, 0]), 1e-9), float(fitted.intercept_[0])])
