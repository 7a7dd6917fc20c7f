"""GraNet: ever fewer weights, and at each step as many brought back by gradients as go by size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods.sparsifiers import Masks, Training
from mixtura.methods.sparsifiers._shared import ErdosRenyi, Gradual

METHOD = {"paper": 167, "title": "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration"}

# The share that is exchanged falls to this in the end.
_LEAST_RATE = 0.005


@final
class GraNet(Gradual):
    """Gradual pruning with regrowth (neuroregeneration): small weights go, those of large gradient come back.

    From ``begin`` to ``end``, shares of the training, the share of weights that are left falls to ``density``
    by a cubic curve; the largest over all matrices stay. Each time, and until the training ends, every
    matrix then loses the smallest ``rate`` of what it has left and gets as many back, those whose gradient
    is largest among all that it lacks; ``rate`` falls with a cosine. What comes back begins at zero, or where
    it was if it went this very time. With ``initial_density`` below 1 the training is sparse from its first
    step: weights are drawn, more of narrow matrices (ERK).

    Shapes:
        Matrices of any shape to masks of theirs; a stack of experts' matrices is one.

    Raises:
        SettingError: ``density`` is not above 0 and at most ``initial_density``, ``begin`` and ``end`` are
            not in [0, 1] and in order, ``rate`` not in [0, 1], or ``every`` below 1.

    Example:
        >>> weights = {"a": torch.tensor([[3.0, 2.0, 1.0, 0.0]])}
        >>> gradients = {"a": torch.tensor([[0.0, 0.0, 0.1, 9.0]])}
        >>> ones = {"a": torch.ones(1, 4) > 0}
        >>> training = Training(weights, gradients, ones, 99, 100)
        >>> GraNet(density=0.75).masks(training)["a"].tolist()  # 1 goes by its size, 0 comes back
        [[True, True, False, True]]

    Differences from the paper:
        The last pruning leaves ``density`` exactly, where the released code stops a step of the curve before.
        Nothing is exchanged after the training's last step, since nothing would train what came back, nor
        where there are no gradients. Shares in place of epochs: ``end`` 0.7 is about the code's 110 of 160
        epochs; ``density`` 0.1 is of its examples. Experts' matrices, attention and dense layers are pruned,
        but not routers, embeddings and head. Adam's first moment is masked as the code masks momentum.

        A model of two layers of eight experts, 300 steps, a tenth of the weights left, masks anew every 20
        steps, 3 seeds, loss in nats a token on 16,384 held-out tokens: `gra_net` 4.906, `magnitude` 4.914,
        lower with every seed (by 0.002 to 0.016: too little for three seeds to tell), the dense model 4.730,
        that pruned to a tenth at once after training 6.86.

    Reference:
        Sparse Training via Boosting Pruning Plasticity with Neuroregeneration (Liu, Chen, Chen, Atashgahi,
        Yin, Kou, Shen, Pechenizkiy, Wang and Mocanu, 2021, arXiv 2106.10404; paper 167). Its abstract and
        its repository, Shiweiliuiiiiiii/GraNet, were read.
    """

    def __init__(
        self,
        *,
        density: float = 0.1,
        initial_density: float = 1.0,
        begin: float = 0.0,
        end: float = 0.7,
        every: int = 100,
        rate: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(density=density, initial_density=initial_density, begin=begin, end=end, every=every)
        self.rate, self.seed = self.within("rate", rate, 0.0, 1.0), seed

    def start(self, weights: Mapping[str, Float[Tensor, "..."]]) -> Masks:
        if self.initial_density == 1:
            return super().start(weights)
        return ErdosRenyi.masks(weights, self.initial_density, self.seed)

    def due(self, step: int, num_steps: int) -> bool:
        going_on = step % self.every == 0 and self.last(num_steps) <= step < num_steps
        return super().due(step, num_steps) or going_on

    def masks(self, training: Training) -> Masks:
        done = training.step / training.num_steps
        rate = _LEAST_RATE + (self.rate - _LEAST_RATE) * (1 + math.cos(math.pi * done)) / 2
        kept = self.fewer(training)
        return {
            name: _exchanged(kept[name], weight, training.gradients[name], min(self.rate, rate))
            for name, weight in training.weights.items()
        }


def _exchanged(mask: Tensor, weight: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """A mask that lost its smallest weights, and has as many others of largest gradient."""
    left, sizes = mask.flatten().clone(), weight.detach().abs().flatten()
    number = math.ceil(rate * int(left.sum()))
    if not number or not bool(gradient.any()):
        return mask
    left[torch.where(left, sizes, torch.inf).sort(stable=True).indices[:number]] = False
    wanted = torch.where(left, -1.0, gradient.detach().abs().flatten().float())
    left[wanted.sort(descending=True, stable=True).indices[:number]] = True
    return left.view(mask.shape)
