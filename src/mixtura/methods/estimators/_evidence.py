"""Evidence as Dirichlet distributions: what a critic believes of two outcomes, and how sure it is."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def squared_error(alpha: Float[Tensor, "T C"], wanted: Float[Tensor, "T C"]) -> Float[Tensor, " T"]:
    """The expected squared error of probabilities drawn from a Dirichlet distribution: bias and variance."""
    total = alpha.sum(-1, keepdim=True)
    mean = alpha / total
    return ((wanted - mean).square() + mean * (1 - mean) / (total + 1)).sum(-1)


def wrong_evidence(alpha: Float[Tensor, "T C"], wanted: Float[Tensor, "T C"]) -> Float[Tensor, " T"]:
    """The divergence from knowing nothing of what speaks for other outcomes than the wanted one."""
    left = wanted + (1 - wanted) * alpha
    total, num = left.sum(-1), left.shape[-1]
    digamma = torch.digamma(left) - torch.digamma(total)[:, None]
    constant = torch.lgamma(total) - torch.lgamma(left).sum(-1) - torch.lgamma(total.new_tensor(float(num)))
    return constant + ((left - 1) * digamma).sum(-1)
