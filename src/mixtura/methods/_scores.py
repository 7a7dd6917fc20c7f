"""What methods of several kinds compute of scores and of loads: probabilities, entropy, means, evenness."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor
from torch.nn import functional as F


def softmax(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Probabilities over the experts, in float32 at least."""
    return F.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def entropy(scores: Float[Tensor, "T E"]) -> Float[Tensor, " T"]:
    """The entropy of each token's probabilities in nats; a probability of 0 counts as 0, in gradients too."""
    return -(scores * scores.clamp(min=torch.finfo(scores.dtype).tiny).log()).sum(-1)


def masked(logits: Float[Tensor, "T E"], allowed: Bool[Tensor, "T E"] | None) -> Float[Tensor, "T E"]:
    """The logits, minus infinity where an expert is not allowed; all of them where none is."""
    if allowed is None:
        return logits
    usable = allowed | ~allowed.any(-1, keepdim=True)
    return logits.masked_fill(~usable, -torch.inf)


def to_sum_one(
    weights: Float[Tensor, "T K"], total: Float[Tensor, "T 1"] | None = None
) -> Float[Tensor, "T K"]:
    """Each token's weights over their sum, or over ``total``; zeros stay zeros.

    A sum so small that its inverse would overflow in the way back, as that of probabilities that all
    but vanish is, has no gradient.
    """
    total = weights.sum(-1, keepdim=True) if total is None else total
    tiny = torch.finfo(weights.dtype).tiny
    sure = total > tiny**0.8
    lost = weights.detach() / total.detach().clamp(min=tiny)
    return torch.where(sure, weights / torch.where(sure, total, 1.0), lost)


def mean_of_valid(values: Float[Tensor, "T *_"], valid: Bool[Tensor, " T"]) -> Float[Tensor, "*_"]:
    """The mean over valid tokens; 0 where there are none."""
    return values[valid].sum(0) / valid.sum().clamp(min=1)


def squared_variation(values: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    """The squared coefficient of variation: variance over squared mean; 0 where nothing is used."""
    mean = values.mean()
    variance = values.var(unbiased=False)
    return torch.where(mean == 0, variance * 0, variance / mean.square().clamp(min=1e-10))


def crowding(shares: Float[Tensor, " R"], scores: Float[Tensor, " R"]) -> Float[Tensor, ""]:
    """R times the sum over R places of share of the load times mean score: 1 when either is even.

    Element by element: under autocast a product of vectors would be computed in bfloat16.
    """
    return shares.shape[0] * (shares * scores).sum()


def violation(counts: Num[Tensor, " E"]) -> Float[Tensor, ""]:
    """How far the fullest expert is above the mean load, as a share of the mean: 0 when all are even.

    >>> violation(torch.tensor([6, 2, 2, 2])).item()
    1.0
    """
    exact = counts.to(torch.float32)
    return exact.max() / exact.mean().clamp(min=torch.finfo(torch.float32).tiny) - 1
