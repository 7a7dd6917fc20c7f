"""Gradual magnitude pruning: the smallest weights go, by and by, for good."""

from __future__ import annotations

from typing import final

from mixtura.methods.sparsifiers import Masks, Training
from mixtura.methods.sparsifiers._shared import Gradual

METHOD = {
    "paper": None,
    "title": "To prune, or not to prune: exploring the efficacy of pruning for model compression",
}


@final
class Magnitude(Gradual):
    """Set the smallest weights to zero while training goes on (GMP), fast at first and ever more slowly.

    From ``begin`` to ``end``, shares of the training, the share of weights that are left falls from all to
    ``density`` by a cubic curve, every so many steps. Weights are compared over all matrices; what is zero
    stays so. The baseline of pruning in training.

    Shapes:
        Matrices of any shape to masks of theirs.

    Raises:
        SettingError: ``density`` is not above 0 and at most 1, ``begin`` and ``end`` are not in [0, 1] and in
            order, or ``every`` is below 1.

    Example:
        >>> import torch
        >>> weights, ones = {"a": torch.tensor([[3.0, -1.0, 2.0, 0.5]])}, {"a": torch.ones(1, 4) > 0}
        >>> Magnitude(density=0.5).masks(Training(weights, weights, ones, 80, 100))["a"].tolist()
        [[True, False, True, False]]

    Differences from the paper:
        Weights are compared over all matrices, as GraNet's code (paper 167) does it, in place of matrix by
        matrix. Defaults are those of `gra_net` here, but ``every``, which is 100 steps.

    Reference:
        To prune, or not to prune: exploring the efficacy of pruning for model compression (Zhu and Gupta,
        2017; not in the collection); read by way of the released code of paper 167, which has it as GMP.
    """

    def __init__(
        self, *, density: float = 0.1, begin: float = 0.0, end: float = 0.7, every: int = 100
    ) -> None:
        super().__init__(density=density, initial_density=1.0, begin=begin, end=end, every=every)

    def masks(self, training: Training) -> Masks:
        return self.fewer(training)
