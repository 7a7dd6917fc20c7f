"""Attention from one model's states to several models', and what a choice of models by a prompt needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.ensembles import Text


@final
class Crossing(nn.Module):
    """What one model's states take from several models', after a stack of layers.

    Every model's states are projected to a shared width; the primary model's attend to all of them, its own
    among them, up to their own column; what they gather is projected back and added. The projections back
    begin at zero, so that a new one changes nothing.
    """

    def __init__(self, widths: Sequence[int], shared: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for width in widths)
        self.into = nn.ModuleList(nn.Linear(width, shared, bias=False) for width in widths)
        self.queries = nn.Linear(shared, shared, bias=False)
        self.keys_values = nn.Linear(shared, 2 * shared, bias=False)
        made = [nn.Linear(shared, width, bias=False) for width in widths]
        for one in made:
            nn.init.zeros_(one.weight)
        self.back = nn.ModuleList(made)

    def forward(
        self,
        primary: int,
        own: Float[Tensor, "S T D"],
        others: dict[int, Tensor],
        weights: Float[Tensor, "S M"],
        valid: Int[Tensor, "S T"],
    ) -> Float[Tensor, "S T D"]:
        """The primary model's states with what they gather from the others'.

        ``weights`` is 0 where a row does not ask a model; what is gathered from a model is multiplied by it.
        Padding is on the right, so that every column sees one that is none.
        """
        states = others | {primary: own}
        latents = {place: self.into[place](self.norms[place](held.float())) for place, held in states.items()}
        allowed, keys, values = [], [], []
        columns = torch.arange(own.shape[1], device=own.device)
        causal = columns[:, None] >= columns
        for place, latent in latents.items():
            key, value = self.keys_values(latent).chunk(2, -1)
            weight = weights[:, place, None, None]
            seen = causal & (valid[:, None] > 0) & (weight > 0)
            allowed.append(seen)
            keys.append(key)
            values.append(value * weight)
        gathered = F.scaled_dot_product_attention(
            self._split(self.queries(latents[primary])),
            self._split(torch.cat(keys, 1)),
            self._split(torch.cat(values, 1)),
            attn_mask=torch.cat(allowed, 2)[:, None],
        )
        joined = gathered.transpose(1, 2).flatten(2)
        added: Tensor = self.back[primary](joined)
        return own + added.to(own.dtype)

    def _split(self, states: Float[Tensor, "S T C"]) -> Float[Tensor, "S H T C2"]:
        heads: Tensor = states.reshape(*states.shape[:2], self.heads, -1)
        return heads.transpose(1, 2)


def mean_of_prompt(text: Text) -> Float[Tensor, "S D"]:
    """The mean of what the first model's output layer is given for the prompt of each row."""
    hidden = text.hidden(0).float()
    # A row without a prompt goes by its first token.
    length = text.prompt.clamp(min=1)[:, None]
    inside = torch.arange(hidden.shape[1], device=hidden.device) < length
    return (hidden * inside[..., None]).sum(1) / length


def spread_of_choices(
    scores: Float[Tensor, "S M"], chosen: Float[Tensor, "S M"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The mean entropy of the choices, and how uneven they are over models: 1 where they are even.

    >>> even = torch.eye(2)
    >>> [round(one.item(), 4) for one in spread_of_choices(torch.zeros(2, 2), even)]
    [0.6931, 1.0]
    """
    soft = scores.softmax(-1)
    entropy = -(soft * scores.log_softmax(-1)).sum(-1).mean()
    uneven = (chosen.mean(0) * soft.mean(0)).sum() * soft.shape[-1] / chosen.sum(-1).mean()
    return entropy, uneven
