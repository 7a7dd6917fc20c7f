"""The router's logit of each token's first expert."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods.statistics import LayerTokens, Statistic

METHOD = {
    "paper": 202,
    "title": "PreMoe: Lightening MoEs on Constrained Memory by Expert Pruning and Retrieval",
    "tags": ["reads:logits"],
}


@final
class TopLogit(Statistic):
    """The router's logit where it is the largest of the token's chosen experts, 0 for its other experts.

    Added up over a task's tokens and divided by their number, this is the task-conditioned expected
    selection score (TCESS).

    Shapes:
        ``[N]`` ones; a factor ``[T, K]`` of logits ``[T, E]``.

    Example:
        >>> logits = torch.tensor([[0.5, 3.0, -1.0]])
        >>> tokens = LayerTokens(chosen=torch.tensor([[0, 1]]), weights=torch.ones(1, 2), logits=logits)
        >>> TopLogit().factor(tokens).tolist()
        [[0.0, 3.0]]

    Differences from the paper:
        Only experts that the token really reached are compared, so that correction biases and groups
        are heeded; its code compares the logits of all experts. One expert a token and no threshold on
        its probability, as in its code; of equal logits the lower expert's. Logits are as the router's
        matrix gives them and may be negative, as in its code: an expert that wins with a negative logit
        then ranks below one that never wins.

    Reference:
        PreMoe: Lightening MoEs on Constrained Memory by Expert Pruning and Retrieval (paper 202); its
        code, JarvisPei/PreMoe at 22780f1, ``collect_utils.py``.
    """

    def measure(
        self,
        inputs: Float[Tensor, "N D"],
        outputs: Float[Tensor, "N D"],
        weights: Float[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        return torch.ones_like(weights, dtype=torch.float32)

    def factor(self, tokens: LayerTokens) -> Float[Tensor, "T K"]:
        assert tokens.logits is not None
        logits = tokens.logits.float()
        num_experts = logits.shape[-1]
        present = tokens.chosen < num_experts
        own = logits.gather(-1, tokens.chosen.clamp(max=num_experts - 1))
        best = own.masked_fill(~present, -torch.inf).amax(-1, keepdim=True)
        # Of several with the largest logit, the lowest expert's number.
        winners = torch.where(present & (own == best), tokens.chosen, num_experts)
        return torch.where(winners == winners.amin(-1, keepdim=True), own, 0.0) * present
