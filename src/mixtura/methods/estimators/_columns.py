"""A column of rows that holds a number of something, such as a question or a language, and no feature."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtura.errors import SettingError, UserError


@final
class NumberColumn(nn.Module):
    """Takes one column out of standardised rows and reads it as whole numbers from ``least`` to ``last``.

    Without a column every number is ``least``.
    """

    def __init__(self, what: str, column: int | None, d_in: int, least: int, last: int) -> None:
        super().__init__()
        if column is not None and not column < d_in > 1:
            raise SettingError(f"the column of {what} must be one of {d_in}, beside others, got {column}")
        self.what, self.column, self.least, self.last = what, column, least, last
        self.d_out = d_in - (column is not None)
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor([0.0, 1.0]))

    def learn(self, mean: Any, scale: Any) -> None:
        """Tell it how columns were standardised."""
        if self.column is not None:
            at = [float(mean[self.column]), float(scale[self.column])]
            self.scale.copy_(torch.tensor(at, dtype=torch.float64))

    def features(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n F"]:
        """Rows without the column."""
        if self.column is None:
            return x
        return torch.cat([x[:, : self.column], x[:, self.column + 1 :]], dim=1)

    def numbers(self, x: Float[Tensor, "n D"]) -> Int[Tensor, " n"]:
        """The column as whole numbers.

        Raises:
            UserError: there are others.
        """
        if self.column is None:
            return torch.full((len(x),), self.least)
        raw = x[:, self.column] * self.scale[1] + self.scale[0]
        number = raw.round().long()
        if ((raw - number).abs() > 1e-3).any() or ((number < self.least) | (number > self.last)).any():
            raise UserError(
                f"{self.what} (column {self.column}) are whole numbers from {self.least} to {self.last}"
            )
        return number
