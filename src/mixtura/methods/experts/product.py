"""Monet's experts: a quarter of a million pairs of halves, computed without ever forming a pair."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods._grids import grid_of
from mixtura.methods.experts import Bank
from mixtura.methods.experts._shared import begun, drawn_matrices, multiplied
from mixtura.types import LayerShape, Ran, Rows

METHOD = {
    "paper": 192,
    "title": "Monet: Mixture of Monosemantic Experts for Transformers",
    "tags": ["gates", "token_independent"],
}


@final
class Product(Bank):
    """Experts on a grid of R rows and C columns, expert (i, j) made of row i's half and column j's.

    ``variant="horizontal"``: rows have the matrices that read, columns those that write:
    ``V_j act(U_i x + b_i) + c_j``. ``"vertical"``: rows and columns each have half of the hidden features and
    half of the outputs, coupled by four matrices: with ``h1 = act(U1_i x + a_i)`` and ``h2 = act(U2_j x +
    a_j)`` the first half of the output is ``V11_i h1 + V12_i h2 + b_i``, the second ``V21_j h1 + V22_j h2 +
    b_j``. ``act`` is the squared ReLU. With the router ``monet`` the sum over all R * C experts is two
    products of the tokens with all rows' and all columns' parts and sums over heads; neither experts nor
    weights are formed one by one, so that memory and time grow with R + C. With other routers the pairs that
    are chosen are computed. E is R * C, as square as E allows.

    Shapes:
        ``x [N, D]`` to ``[N, D]``. Horizontal: R (F D + F) and C (F D + D) numbers. Vertical:
        (R + C) (F D / 2 + F / 2) that read, (R + C) (F D / 2 + D / 2) that write.

    Raises:
        SettingError: ``variant`` is unknown, or with ``"vertical"`` ``d_model`` or ``d_expert`` is odd.

    Example:
        >>> bank = Product(LayerShape(d_model=4, d_expert=2, num_experts=10_000), variant="horizontal")
        >>> sum(one.numel() for one in bank.parameters())  # 100 rows of 10, 100 columns of 12
        2200

    Differences from the paper:
        None known in the computation, which is that of the authors' file for inference.

    Reference:
        Monet: Mixture of Monosemantic Experts for Transformers (paper 192); repository dmis-lab/Monet.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        variant: Literal["vertical", "horizontal"] = "vertical",
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.variant = variant
        self.seed = seed
        self.grid = rows, columns = grid_of(shape.num_experts)
        width, hidden, generator = shape.d_model, shape.d_expert, begun(seed)
        parts = 2 if variant == "vertical" else 1
        for name, size in (("d_model", width), ("d_expert", hidden)):
            if size % parts:
                raise SettingError(
                    f"{name} must be even for the variant vertical, which halves it, got {size}; choose "
                    "another, or variant: horizontal"
                )
        self.read_rows = drawn_matrices(generator, rows, hidden // parts, width)
        self.read_rows_bias = nn.Parameter(torch.zeros(rows, hidden // parts))
        self.write_columns = drawn_matrices(generator, columns, width // parts, hidden)
        self.write_columns_bias = nn.Parameter(torch.zeros(columns, width // parts))
        if variant == "vertical":
            self.read_columns = drawn_matrices(generator, columns, hidden // 2, width)
            self.read_columns_bias = nn.Parameter(torch.zeros(columns, hidden // 2))
            self.write_rows = drawn_matrices(generator, rows, width // 2, hidden)
            self.write_rows_bias = nn.Parameter(torch.zeros(rows, width // 2))

    def num_used(self, num_chosen: float) -> float:
        # All rows and all columns, however few pairs count.
        return sum(one.numel() for one in self.parameters())

    def run_gates(
        self, x: Float[Tensor, "T D"], rows: Float[Tensor, "T H R"], columns: Float[Tensor, "T H C"]
    ) -> Float[Tensor, "T D"]:
        rows, columns = rows.to(x), columns.to(x)
        made = read(x, self.read_rows, self.read_rows_bias)
        # What a column's experts get from all rows, and the weight of the column in all its experts.
        met = torch.einsum("thm,thc->tcm", torch.einsum("trm,thr->thm", made, rows), columns)
        weights = torch.einsum("thc,th->tc", columns, rows.sum(-1))
        if self.variant == "horizontal":
            return written(met, weights, self.write_columns, self.write_columns_bias)
        other = read(x, self.read_columns, self.read_columns_bias)
        met = torch.cat([met, weights[..., None] * other], dim=-1)
        second = written(met, weights, self.write_columns, self.write_columns_bias)
        met = torch.einsum("thm,thr->trm", torch.einsum("tcm,thc->thm", other, columns), rows)
        weights = torch.einsum("thr,th->tr", rows, columns.sum(-1))
        met = torch.cat([weights[..., None] * made, met], dim=-1)
        return torch.cat([written(met, weights, self.write_rows, self.write_rows_bias), second], dim=-1)

    def run(self, rows: Rows) -> Ran:
        row, column = rows.expert_ids // self.grid[1], rows.expert_ids % self.grid[1]
        hidden = read(rows.x, self.read_rows, self.read_rows_bias)[rows.token_ids, row]
        if self.variant == "horizontal":
            return Ran(multiplied(hidden, column, self.write_columns, self.write_columns_bias))
        other = read(rows.x, self.read_columns, self.read_columns_bias)[rows.token_ids, column]
        hidden = torch.cat([hidden, other], dim=-1)
        first = multiplied(hidden, row, self.write_rows, self.write_rows_bias)
        second = multiplied(hidden, column, self.write_columns, self.write_columns_bias)
        return Ran(torch.cat([first, second], dim=-1))


def read(
    x: Float[Tensor, "T D"], weight: Float[Tensor, "R M D"], bias: Float[Tensor, "R M"]
) -> Float[Tensor, "T R M"]:
    """The hidden features that every row, or column, makes of a token."""
    made = F.linear(x, weight.flatten(0, 1), bias.flatten())
    return F.relu(made).square().view(x.shape[0], *bias.shape)


def written(
    hidden: Float[Tensor, "T R M"],
    weights: Float[Tensor, "T R"],
    weight: Float[Tensor, "R O M"],
    bias: Float[Tensor, "R O"],
) -> Float[Tensor, "T O"]:
    """The sum of what all rows, or columns, write of weighted features, their biases weighted, too."""
    return hidden.flatten(1) @ weight.transpose(1, 2).flatten(0, 1) + weights @ bias
