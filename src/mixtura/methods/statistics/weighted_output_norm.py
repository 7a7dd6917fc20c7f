"""The length of what an expert adds to the layer's output."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods.statistics import Statistic

METHOD = {
    "paper": 136,
    "title": "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
}


@final
class WeightedOutputNorm(Statistic):
    """Euclidean norm of the expert's output times its routing weight: what it adds to the layer.

    The mean of the products is kept, which is not the product of the mean weight and the mean norm.

    Shapes:
        ``outputs [N, D]`` and ``weights [N]`` to ``[N]``.

    Example:
        >>> outputs = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> WeightedOutputNorm().measure(outputs, outputs, torch.tensor([0.5, 0.25])).tolist()
        [2.5, 0.5]

    Differences from the paper:
        The weight is the one the experts are added up with, where the paper's code recomputes a
        softmax over all experts, whatever the model's router does.

    Reference:
        REAP the Experts: Why Pruning Prevails for One-Shot MoE compression (paper 136); its code,
        CerebrasResearch/reap, ``pruning_metrics.py``.
    """

    def measure(
        self,
        inputs: Float[Tensor, "N D"],
        outputs: Float[Tensor, "N D"],
        weights: Float[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        norm: Tensor = torch.linalg.vector_norm(outputs.float(), dim=-1)
        return weights.float().abs() * norm
