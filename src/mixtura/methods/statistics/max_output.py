"""The largest number in an expert's output."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods.statistics import Statistic

METHOD = {
    "paper": 190,
    "title": "Unveiling Super Experts in Mixture-of-Experts Large Language Models",
}


@final
class MaxOutput(Statistic):
    """Largest absolute value in the expert's output, before it is weighted.

    The maximum over all tokens is kept. Experts with rare, extreme values make the massive activations
    that attention sinks rest on.

    Shapes:
        ``outputs [N, D]`` to ``[N]``.

    Example:
        >>> outputs = torch.tensor([[3.0, -4.0], [0.0, 2.0]])
        >>> MaxOutput().measure(outputs, outputs, torch.ones(2)).tolist()
        [4.0, 2.0]

    Differences from the paper:
        Of every token; the paper's code looks at one token of each call only, since its hook takes the
        first row of a matrix for the whole of it. Where a family has a bias or a norm after the down
        projection, it is included. REAP's code takes the largest value with its sign.

    Reference:
        Unveiling Super Experts in Mixture-of-Experts Large Language Models (paper 190); its code,
        ZunhaiSu/Super-Experts-Profilling at 573aead, ``eval_utils.py``; REAP's ``max_activations``,
        CerebrasResearch/reap at 1970473, ``pruning_metrics.py``.
    """

    def measure(
        self,
        inputs: Float[Tensor, "N D"],
        outputs: Float[Tensor, "N D"],
        weights: Float[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        largest: Tensor = torch.linalg.vector_norm(outputs.float(), torch.inf, dim=-1)
        return largest
