"""Parts of training losses that belong to routers, not to balancers: evenness and likeness."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mixtura.methods._precision import full_precision
from mixtura.methods._scores import crowding
from mixtura.methods.routers._shared import choice_shares


def unevenness(
    chosen: Int[Tensor, "T K"], scores: Float[Tensor, "T R"], valid: Bool[Tensor, " T"]
) -> Float[Tensor, ""]:
    """How much tokens crowd: R times the sum over R places of share of choices times mean score.

    The form of the Switch Transformer's balancing loss: 1 when all is even, R when all go to one place
    with certainty; 0 without tokens. Only the scores have a gradient.
    """
    return crowding(*choice_shares(chosen, scores, valid))


@full_precision()
def contrast(
    first: Float[Tensor, "n D"], second: Float[Tensor, "n D"], temperature: float, block: int = 256
) -> Float[Tensor, ""]:
    """InfoNCE: whether each row is more like its own counterpart than like those of other rows.

    The mean cross entropy of a softmax over cosines divided by the temperature, within blocks of so many
    rows; 0 without rows.
    """
    total = first.new_zeros(())
    for ours, theirs in zip(first.split(block), second.split(block), strict=True):
        alike = F.normalize(ours, dim=-1) @ F.normalize(theirs, dim=-1).T / temperature
        own = torch.arange(alike.shape[0], device=alike.device)
        total = total + F.cross_entropy(alike, own, reduction="sum")
    return total / max(first.shape[0], 1)


@full_precision()
def alikeness(outputs: Float[Tensor, "T K D"]) -> Float[Tensor, " T"]:
    """The mean cosine of a token's K outputs, over all pairs, that of one with itself counted as 0."""
    directions = F.normalize(outputs, dim=-1)
    cosines = directions @ directions.transpose(1, 2)
    return (cosines * (1 - torch.eye(outputs.shape[1], device=outputs.device))).mean((1, 2))
