"""What the experts of a layer compute."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.methods.settings import Ranged
from mixtura.types import LayerShape, Matrices, Ran, Rows

KIND = {
    "base": "Bank",
    "summary": "Computes what the experts of a layer make of their tokens.",
    "tags": {
        "materialises": "its experts are matrices, which mixers, balancers and routers may read and merge",
        "own_matrices": "each expert has its own matrices that read a token, the parameter `gate_up_proj`",
        "gates": "computes the sum of all experts of a grid from gates, never expert by expert",
        "reads:FIELD": "looks at this optional field of `RouterInput`",
        "token_independent": "what an expert makes of a token depends on that token alone",
        "rounds": "rounds what it computes with, so that gradients are not those of differences",
    },
}


class Bank(nn.Module, Ranged, ABC):
    """The experts of one layer: what each makes of the tokens that are sent to it, before weighting.

    A method defines `matrices`, which the core multiplies with, reads and merges, or `run`, which computes
    rows itself, or both, where rows are better computed in another way than by the matrices. Nothing is kept
    on the module; parameters are drawn from the method's own ``seed``. Each matrix has numbers of a variance
    of one over its inputs; `rescale` gives them a model's common deviation.

    Shapes: ``shape`` has the width of an expert F and the number of experts E.
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.shape = shape

    def matrices(self) -> Matrices:
        """The experts as tensors, differentiable, made anew at each call. Tag ``materialises``."""
        raise NotImplementedError

    def run(self, rows: Rows) -> Ran:
        """What each assignment's expert makes of its token, not weighted, and the sequences' history."""
        raise NotImplementedError

    def run_gates(
        self, x: Float[Tensor, "T D"], rows: Float[Tensor, "T H R"], columns: Float[Tensor, "T H C"]
    ) -> Float[Tensor, "T D"]:
        """The weighted sum of all experts of the grid, weighted by `Routing.gates`. Tag ``gates``."""
        raise NotImplementedError

    def losses(self) -> Mapping[str, Float[Tensor, ""]]:
        """What the experts add to the training loss, by name, already multiplied by its coefficient."""
        return {}

    def num_used(self, num_chosen: float) -> float:
        """How many of the parameters compute a token that goes to so many experts.

        Parameters whose first axis is the experts count by expert, others whole.
        """
        share, count = num_chosen / self.shape.num_experts, self.shape.num_experts
        return sum(
            one.numel() * (share if one.dim() > 1 and one.shape[0] == count else 1)
            for one in self.parameters()
        )

    @torch.no_grad()
    def rescale(self, deviation: float) -> None:
        """Give matrices drawn with a variance of one over their inputs a common ``deviation`` instead."""
        for parameter in self.parameters():
            if parameter.dim() > 2:
                parameter.mul_(deviation * parameter.shape[-1] ** 0.5)


def materialises(bank: type[Bank]) -> bool:
    """Whether its experts are matrices."""
    return bank.matrices is not Bank.matrices


def runs(bank: type[Bank]) -> bool:
    """Whether it computes rows itself."""
    return bank.run is not Bank.run
