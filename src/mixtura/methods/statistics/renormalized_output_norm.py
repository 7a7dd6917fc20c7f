"""The length of what an expert adds, with weights that sum to one."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods.statistics import LayerTokens, Statistic

METHOD = {
    "paper": 136,
    "title": "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
    "tags": ["reads:weights"],
}


@final
class RenormalizedOutputNorm(Statistic):
    """Norm of the expert's output times its share of the token's routing weights.

    In models whose weights sum to one this is the norm of the weighted output. In others a token that no
    expert is sure of counts as much as any.

    Shapes:
        ``outputs [N, D]`` and ``weights [N]`` to ``[N]``; a factor ``[T, K]``.

    Example:
        >>> weights = torch.tensor([[0.2, 0.2]])
        >>> tokens = LayerTokens(chosen=torch.tensor([[0, 1]]), weights=weights)
        >>> RenormalizedOutputNorm().factor(tokens).tolist()
        [[2.5, 2.5]]

    Differences from the paper:
        Shares are of the weights that the router really used; the paper's code takes them of a softmax
        over all experts, and only where the model's config has ``norm_topk_prob``.

    Reference:
        REAP the Experts: Why Pruning Prevails for One-Shot MoE compression (paper 136); its code,
        CerebrasResearch/reap at 1970473, ``renormalize_router_weights`` in ``pruning_metrics.py``.
    """

    def measure(
        self,
        inputs: Float[Tensor, "N D"],
        outputs: Float[Tensor, "N D"],
        weights: Float[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        norm: Tensor = torch.linalg.vector_norm(outputs.float(), dim=-1)
        return weights.float().abs() * norm

    def factor(self, tokens: LayerTokens) -> Float[Tensor, "T K"]:
        total = tokens.weights.float().abs().sum(-1, keepdim=True)
        return total.clamp(min=torch.finfo(torch.float32).tiny).reciprocal().expand(tokens.chosen.shape)
