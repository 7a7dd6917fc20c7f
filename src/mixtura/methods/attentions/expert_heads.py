"""SHRP: every head an expert, one of them a token, and a feed-forward part behind that all heads share."""

from __future__ import annotations

from typing import final

import torch
from torch.nn import functional as F

from mixtura.methods._drawing import drawn, generator_of
from mixtura.methods._precision import exact_logits
from mixtura.methods.attentions import Attended
from mixtura.methods.attentions._chosen import heads_routing
from mixtura.methods.attentions._shared import OrdinaryHeads, QueryKeyNorm, projection
from mixtura.types.attending import AttentionInput, AttentionShape

METHOD = {
    "paper": 50,
    "title": "SHRP: Specialized Head Routing and Pruning for Efficient Encoder Compression",
    "tags": ["routes"],
}


@final
class ExpertHeads(OrdinaryHeads):
    """Take what one head gathers, and let one shared feed-forward part make the output of it (SHRP).

    Attention heads are experts (Expert Attention): all of them attend, a token takes the one whose gate
    ``softmax(gate @ x)`` is highest, and a feed-forward part, the expander, which all heads share, makes an
    output as wide as the model of its W features, weighted by the gate. As heads need no part in a common
    last matrix, those that few tokens choose can go after training: ``mixtura condense MODEL --heads 1``
    leaves the heads of each layer that most tokens of a text choose, with keys, values and router rows
    of these alone, and with one head nothing is routed any more.

    Shapes:
        ``x [B, Q, D]`` to ``[B, Q, D]``; routing of B * Q tokens to H heads; projections of H queries and G
        keys and values of W features, a gate ``[H, D]``, an expander of ``W * width + width * D``.

    Raises:
        SettingError: ``width`` is below 1, or queries and keys are to be normed over all heads.

    Example:
        >>> from mixtura.modeling.family import MixturaConfig, MixturaModel
        >>> config = MixturaConfig(hidden_size=32, num_hidden_layers=1, attention="expert_heads")
        >>> routing = MixturaModel(config)(torch.arange(16)[None]).head_routings[0]
        >>> routing.load.shape, int(routing.load.sum())  # 16 tokens, a head each
        (torch.Size([4]), 16)

    Differences from the paper:
        Of the paper its abstract and the beginning of its introduction were read. Written for a decoder that
        is trained from the start, where the paper compresses BERT. What the expander is made of (two
        matrices, SiLU between, twice the model's width by default), that outputs are weighted by the softmax
        over heads, and how routers begin, are our own. The feed-forward part of the layer stays. Nothing
        balances heads. How many heads stay is for the user to say, and nothing is trained after they went.

        Which heads tokens choose said little of which may go: two layers of four heads, 200 steps, 3 seeds,
        loss in nats a token on 4,096 held-out tokens: all heads 4.70; of the two most used 4.84, the two
        least used 4.87, two by lot 4.83, the two of largest projections 4.84; of the one most used 5.18, by
        lot 5.25, least used 5.29 (seeds differ by 0.15).

    Reference:
        SHRP: Specialized Head Routing and Pruning for Efficient Encoder Compression (Su, Zhang, Zhang, Liu,
        Xu and Zhang, 2025, arXiv 2512.20635; paper 50).
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        width: int | None = None,
        bias: bool = False,
        query_key_norm: QueryKeyNorm = "none",
        eps: float = 1e-6,
        seed: int = 0,
    ) -> None:
        super().__init__(shape, shape, bias=bias, norm=query_key_norm, eps=eps, seed=seed)
        self.by_head(query_key_norm)
        self.width = None if width is None else self.within("width", width, 1, 1 << 30)
        wide, generator = self.width or 2 * shape.d_model, generator_of(seed + 2)
        self.up_proj = projection(generator, shape.d_head, wide, bias=bias)
        self.o_proj = projection(generator, wide, shape.d_model, bias=bias)
        self.gate = drawn(seed + 1, shape.num_heads, shape.d_model, scale=1 / 3)

    def forward(self, inputs: AttentionInput) -> Attended:
        logits = exact_logits(inputs.x.flatten(0, 1), self.gate).unflatten(0, inputs.x.shape[:2])
        scores = logits.softmax(-1)
        # Of equal gates the first head is taken, on every device.
        best = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :1]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & inputs.valid[..., None]
        gathered, _ = self.gathered(inputs)
        own = gathered.gather(2, best[..., None].expand(-1, -1, 1, gathered.shape[-1])).squeeze(2)
        weight = scores.gather(-1, best)
        output = self.o_proj(F.silu(self.up_proj(own))) * weight.to(inputs.x.dtype)
        by_head = chosen.transpose(1, 2), (scores * chosen).transpose(1, 2)
        return output, None, heads_routing(inputs, *by_head, logits, scores, {})
