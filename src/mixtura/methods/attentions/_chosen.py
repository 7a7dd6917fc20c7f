"""Heads that see some of the tokens each: projections, attention, and what they keep of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods._drawing import generator_of, normal
from mixtura.methods._norms import RMSNorm
from mixtura.methods._precision import exact
from mixtura.methods.attentions._shared import rotated
from mixtura.types import Routing
from mixtura.types.attending import AttentionInput, AttentionShape

Positions = Literal["true", "rank"]


@final
class ChosenHeads(nn.Module):
    """H heads, each with projections of its own, among the tokens that are in it.

    A token in a head sees the tokens that are in it, too, and are not later. Only these tokens are
    multiplied, and only their keys and values are kept for later ones.

    Args:
        shape: its ``num_heads`` are H.
        seed: of the projections, drawn with a variance of one over their inputs.
        bias: of every projection.
        norm: whether queries and keys are normed, with one norm for all heads.
        eps: of the norm.
        positions: whether a token is turned by its place in the text or by its rank among the head's tokens.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        seed: int,
        bias: bool,
        norm: bool,
        eps: float,
        positions: Positions = "true",
    ) -> None:
        super().__init__()
        self.positions = positions
        heads, width = shape.num_heads, shape.d_head
        generator = generator_of(seed)
        inwards = (heads, 3 * width, shape.d_model)
        self.inwards = nn.Parameter(normal(generator, *inwards) / shape.d_model**0.5)
        self.outwards = nn.Parameter(normal(generator, heads, shape.d_model, width) / (heads * width) ** 0.5)
        self.in_bias = nn.Parameter(torch.zeros(inwards[:2])) if bias else None
        self.out_bias = nn.Parameter(torch.zeros(heads, shape.d_model)) if bias else None
        self.q_norm = RMSNorm(width, eps) if norm else None
        self.k_norm = RMSNorm(width, eps) if norm else None

    @torch.no_grad()
    def rescale(self, deviation: float) -> None:
        """Give the projections a common ``deviation``."""
        heads, d_model, width = self.outwards.shape
        self.inwards.mul_(deviation * d_model**0.5)
        self.outwards.mul_(deviation * (heads * width) ** 0.5)

    def forward(
        self, inputs: AttentionInput, chosen: Bool[Tensor, "B H Q"], weights: Float[Tensor, "B H Q"]
    ) -> tuple[Float[Tensor, "B Q D"], dict[str, Tensor]]:
        """What tokens gather in the heads that they are in, weighted, and what to remember for later ones."""
        num = int(chosen.sum(-1).max()) if chosen.numel() else 0
        order = (~chosen).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :num]
        present = chosen.gather(-1, order)
        row = torch.arange(order.shape[0], device=order.device)[:, None, None]
        x = inputs.x[row, order]
        query, key, value = self._projected(x)
        cos, sin = self._turns(inputs, order, row)
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        keys, values, held = _joined(inputs.history, key, value, present)
        mask = self._mask(inputs.sequence_ids[row, order], held)
        gathered = F.scaled_dot_product_attention(query, keys, values, mask, inputs.dropout)
        made = torch.einsum("bhmw,hdw->bhmd", gathered, self.outwards.to(gathered))
        if self.out_bias is not None:
            made = made + self.out_bias[:, None].to(made)
        weighted = exact(made) * torch.where(present, exact(weights).gather(-1, order), 0.0)[..., None]
        output = torch.zeros_like(inputs.x, dtype=weighted.dtype)
        places = order.flatten(1)[..., None].expand(-1, -1, output.shape[-1])
        output = output.scatter_add(1, places, weighted.flatten(1, 2))
        kept = _packed(keys, values, held) if inputs.keeping else {}
        return output.to(inputs.x.dtype), kept

    def _projected(self, x: Float[Tensor, "B H M D"]) -> tuple[Tensor, Tensor, Tensor]:
        features = torch.einsum("bhmd,hrd->bhmr", x, self.inwards.to(x))
        if self.in_bias is not None:
            features = features + self.in_bias[:, None].to(features)
        query, key, value = features.chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def _turns(
        self, inputs: AttentionInput, order: Int[Tensor, "B H M"], row: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens in each head."""
        if self.positions == "true":
            rows = inputs.x.shape[0]
            return inputs.cos.expand(rows, -1, -1)[row, order], inputs.sin.expand(rows, -1, -1)[row, order]
        before = inputs.history["held"].sum(-1) if inputs.history else order.new_zeros(order.shape[:2])
        # A document's first token in a head has rank 0, whatever came before it in the row.
        sequence = inputs.sequence_ids[row, order]
        same = sequence[..., :, None] == sequence[..., None, :]
        ranks = same.tril(-1).sum(-1) + before[..., None]
        cos, sin = inputs.turns(ranks.flatten(1))
        return cos.view(*order.shape, -1), sin.view(*order.shape, -1)

    def _mask(self, sequence: Int[Tensor, "B H M"], held: Bool[Tensor, "B H C"]) -> Bool[Tensor, "B H M C"]:
        """Which tokens each sees: those held that are not later, of its own sequence; always itself."""
        num = sequence.shape[-1]
        past = held.shape[-1] - num
        same = (sequence[..., :, None] == sequence[..., None, :]).tril()
        new = same & held[..., None, past:] | torch.eye(num, dtype=torch.bool, device=held.device)
        earlier = held[..., None, :past].expand(*held.shape[:2], num, past)
        return torch.cat([earlier, new], dim=-1)


def _joined(
    history: Mapping[str, Tensor], key: Tensor, value: Tensor, present: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and which of them there are, those of earlier tokens first."""
    if not history:
        return key, value, present
    keys = torch.cat([history["keys"].to(key), key], dim=2)
    values = torch.cat([history["values"].to(value), value], dim=2)
    return keys, values, torch.cat([history["held"], present], dim=2)


def _packed(keys: Tensor, values: Tensor, held: Tensor) -> dict[str, Tensor]:
    """Without the places that no row and head has a token for."""
    num = int(held.sum(-1).max()) if held.numel() else 0
    order = (~held).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :num]
    wide = order[..., None].expand(*order.shape, keys.shape[-1])
    return {"keys": keys.gather(2, wide), "values": values.gather(2, wide), "held": held.gather(2, order)}


def heads_routing(
    inputs: AttentionInput,
    chosen: Bool[Tensor, "B H Q"],
    weights: Float[Tensor, "B H Q"],
    logits: Float[Tensor, "B Q H"],
    scores: Float[Tensor, "B Q H"],
    history: Mapping[str, Tensor],
) -> Routing:
    """Who is in which head, as the routing of T tokens to H experts."""
    by_token = chosen.transpose(1, 2).flatten(0, 1)
    token_ids, head_ids = by_token.nonzero(as_tuple=True)
    return Routing.from_assignments(
        token_ids,
        head_ids,
        weights.transpose(1, 2).flatten(0, 1)[token_ids, head_ids],
        scores=scores.flatten(0, 1),
        logits=logits.flatten(0, 1),
        valid=inputs.valid.flatten(),
        history=history,
    )
