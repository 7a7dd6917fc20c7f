"""The length of an expert's output."""

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
class OutputNorm(Statistic):
    """Euclidean norm of the expert's output, before it is weighted.

    Averaged over an expert's tokens, this is the mean expert activation norm (EAN) that pruning
    papers compare with.

    Shapes:
        ``outputs [N, D]`` to ``[N]``.

    Example:
        >>> outputs = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> OutputNorm().measure(outputs, outputs, torch.ones(2)).tolist()
        [5.0, 0.0]

    Differences from the paper:
        None: ``ean_mean`` of its code.

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
        return norm
