"""Selective multi-head attention: each token chooses some of the heads, and is seen in these alone."""

from __future__ import annotations

from typing import final

import torch

from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact_logits
from mixtura.methods.attentions import Attended, Attention
from mixtura.methods.attentions._chosen import ChosenHeads, Positions, heads_routing
from mixtura.methods.attentions._shared import QueryKeyNorm
from mixtura.types.attending import AttentionInput, AttentionShape

METHOD = {
    "paper": 20,
    "title": "Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer",
    "tags": ["routes", "reads:history"],
}


@final
class SelectiveHeads(Attention):
    """Send each token to the heads of highest gate, and let it attend among the tokens of these (SMHA).

    Attention is cut into H heads of their own queries, keys, values and outputs, which are experts: a token
    is in the ``top_heads`` whose gate ``softmax(gate @ x)`` is highest, sees there the earlier tokens that
    are in them, too, and adds up what it gathers, weighted by its gates, which have a mean of 1 over its
    heads. With ``weigh`` false all weights are 1: with all heads it is then multi-head attention.

    Shapes:
        ``x [B, Q, D]`` to ``[B, Q, D]``; routing of B * Q tokens to H heads; a gate ``[H, D]`` and ``4 H W
        D`` in projections. Remembers keys and values by head of the tokens that are in it.

    Raises:
        SettingError: ``top_heads`` is not in [1, H], or queries and keys are to be normed over all heads.

    Example:
        >>> from mixtura.modeling.family import MixturaConfig, MixturaModel
        >>> attention = {"name": "selective_heads", "top_heads": 1}
        >>> model = MixturaModel(MixturaConfig(hidden_size=32, num_hidden_layers=1, attention=attention))
        >>> routing = model(torch.arange(16)[None]).head_routings[0]
        >>> routing.load.shape, int(routing.load.sum())  # 16 tokens, a head each
        (torch.Size([4]), 16)

    Differences from the paper:
        There gates choose heads and are multiplied with nothing, so that they get no gradient, and are
        normed over the rows of a batch, which changes nothing: ``weigh=False``; by default what heads gather
        is weighted here. There every head takes as many tokens as the fullest, filled up with tokens that
        did not choose it, so that rows of a batch, and later tokens, change each other; here it takes those
        that chose it. There a token is turned by its rank among the head's tokens: ``positions="rank"``; by
        default by its place here. Only the attention is this method: the part of feed-forward experts is an
        ordinary router and experts here. The norm of what is added belongs to the block. As there, half the
        heads by default.

    Reference:
        Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer (paper 20);
        repository YujiaoYang-work/UoE.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        top_heads: int | None = None,
        weigh: bool = True,
        positions: Positions = "true",
        bias: bool = False,
        query_key_norm: QueryKeyNorm = "none",
        eps: float = 1e-6,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_heads = (
            None if top_heads is None else self.within("top_heads", top_heads, 1, shape.num_heads)
        )
        self.weigh, self.positions, self.bias, self.seed = weigh, positions, bias, seed
        self.query_key_norm, self.eps = query_key_norm, self.within("eps", eps, 0.0, 1.0)
        norm = self.by_head(query_key_norm)
        self.gate = drawn(seed + 1, shape.num_heads, shape.d_model, scale=1 / 3)
        self.heads = ChosenHeads(shape, seed=seed, bias=bias, norm=norm, eps=eps, positions=positions)

    def rescale(self, deviation: float) -> None:
        self.heads.rescale(deviation)

    @property
    def num_chosen(self) -> int:
        """How many heads a token is in."""
        return max(1, self.shape.num_heads // 2) if self.top_heads is None else self.top_heads

    def forward(self, inputs: AttentionInput) -> Attended:
        logits = exact_logits(inputs.x.flatten(0, 1), self.gate).unflatten(0, inputs.x.shape[:2])
        scores = logits.softmax(-1)
        # Of equal gates the first head is taken, on every device.
        order = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., : self.num_chosen]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)
        chosen = chosen & inputs.valid[..., None]
        among = scores * chosen
        weights = self.num_chosen * among / among.sum(-1, keepdim=True).clamp(min=1e-30)
        if not self.weigh:
            weights = chosen.to(scores)
        by_head = chosen.transpose(1, 2), weights.transpose(1, 2)
        output, kept = self.heads(inputs, *by_head)
        return output, None, heads_routing(inputs, *by_head, logits, scores, kept)
