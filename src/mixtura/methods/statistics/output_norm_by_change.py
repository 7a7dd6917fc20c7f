"""The length of what an expert adds, by how much the layer changes the token."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mixtura.methods.statistics import LayerTokens, Statistic

METHOD = {
    "paper": 5,
    "title": "Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations",
    "tags": ["reads:residual", "reads:routed"],
}


@final
class OutputNormByChange(Statistic):
    """Norm of the expert's weighted output, times how far the routed experts turn the token.

    How far is one minus the cosine between the hidden state before the routed experts and the same with
    their sum added. Tokens that the layer leaves as they are count for nothing.

    Shapes:
        ``outputs [N, D]`` and ``weights [N]`` to ``[N]``; a factor ``[T, K]``.

    Example:
        >>> residual, routed = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [-1.0, 1.0]])
        >>> choice = torch.tensor([[0], [1]])
        >>> tokens = LayerTokens(chosen=choice, weights=torch.ones(2, 1), residual=residual, routed=routed)
        >>> OutputNormByChange().factor(tokens).tolist()
        [[0.0], [1.0]]

    Differences from the paper:
        The weights are those the experts are added up with. Families that scale or norm the experts' sum
        before they add it are compared as if they did not.

    Reference:
        Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations (paper 5);
        its code, RUCAIBox/EASYEP at 7324eb1, ``pruning/model_new.py`` and ``expert_selection.py``.
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
        assert tokens.residual is not None
        assert tokens.routed is not None
        before = tokens.residual.float()
        alike = F.cosine_similarity(before, before + tokens.routed.float(), dim=-1)
        return (1 - alike).clamp(min=0)[:, None].expand(tokens.chosen.shape)
