"""Mixture of sparse attention: each head chooses tokens to look at, beside ordinary heads or alone."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact_logits
from mixtura.methods.attentions import Attended
from mixtura.methods.attentions._choosing import ranks_before, ranks_in_sequence
from mixtura.methods.attentions._chosen import ChosenHeads, heads_routing
from mixtura.methods.attentions._shared import OrdinaryHeads, QueryKeyNorm
from mixtura.types.attending import AttentionInput, AttentionShape

METHOD = {
    "paper": 61,
    "title": (
        "Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice Routing"
    ),
    "tags": ["routes", "looks_ahead", "causal_inference", "reads:history"],
}
_LEAST = 2


@final
class SparseHeads(OrdinaryHeads):
    """Let each head choose tokens by a learned score and attend among these alone (MoSA, expert choice).

    Of T tokens a head takes the ``max(T // sparsity, 2)`` of highest score ``sigmoid(gate @ x)``; each of
    them sees those that are not later, and what it gathers is multiplied by its score. So a head costs k² in
    place of T², and only k keys are kept. ``num_dense`` of the heads are ordinary ones, which see
    everything.

    In training the choice is made among all tokens of a sequence, later ones, too. At inference, in a whole
    pass as in decoding, a token joins a head if its score is among the highest ``max(n // sparsity, 2)`` of
    the n tokens so far, itself among them, and stays in it.

    Shapes:
        ``x [B, Q, D]`` to ``[B, Q, D]``; routing of B * Q tokens to the heads that choose; a gate ``[H, D]``
        and ``4 H W D`` in projections. Remembers keys and values of what was chosen and all scores.

    Raises:
        SettingError: ``sparsity`` is below 1, ``num_dense`` leaves no head to choose, or queries and keys
            are to be normed over all heads at once, which have not the same tokens.

    Example:
        >>> from mixtura.modeling.family import MixturaConfig, MixturaModel
        >>> attention = {"name": "sparse_heads", "sparsity": 4, "num_dense": 1}
        >>> config = MixturaConfig(hidden_size=32, num_hidden_layers=1, attention=attention)
        >>> routing = MixturaModel(config).train()(torch.arange(16)[None]).head_routings[0]
        >>> routing.load.tolist()  # 16 tokens, three heads that choose a quarter
        [4, 4, 4]

    Differences from the paper:
        Its heads look at later tokens when they choose, at inference as well; the rule for inference is
        ours, and by it a head of n tokens so far has about, not exactly, ``n // sparsity``. Documents in one
        row choose apart. All features are turned by positions, there half of them by default. Projections
        are drawn as the model's other matrices are. Ordinary heads beside have one output projection, as
        there; local attention beside is a window of another layer here. Queries and keys are normed where
        the model's are. By default every head chooses, 1 token in 8; there both are given.

    Reference:
        Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice Routing
            (paper 61);
        repository piotrpiekos/MoSA.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        sparsity: int = 8,
        num_dense: int = 0,
        include_first: bool = False,
        bias: bool = False,
        query_key_norm: QueryKeyNorm = "none",
        eps: float = 1e-6,
        seed: int = 0,
    ) -> None:
        num_sparse = shape.num_heads - self.within("num_dense", num_dense, 0, shape.num_heads - 1)
        norm = self.by_head(query_key_norm)
        dense = replace(shape, num_heads=num_dense, num_key_value_heads=num_dense) if num_dense else None
        super().__init__(shape, dense, bias=bias, norm=query_key_norm, eps=eps, seed=seed + 2)
        self.sparsity = self.within("sparsity", sparsity, 1, 1 << 30)
        self.num_dense = num_dense
        self.include_first, self.seed = include_first, seed
        # A linear layer's own drawing, uniform in 1 / sqrt(D), has this variance.
        self.gate = drawn(seed + 1, num_sparse, shape.d_model, scale=1 / 3)
        sizes = replace(shape, num_heads=num_sparse, num_key_value_heads=num_sparse)
        self.sparse = ChosenHeads(sizes, seed=seed, bias=bias, norm=norm, eps=eps)

    def rescale(self, deviation: float) -> None:
        self.sparse.rescale(deviation)

    def forward(self, inputs: AttentionInput) -> Attended:
        logits = exact_logits(inputs.x.flatten(0, 1), self.gate).unflatten(0, inputs.x.shape[:2])
        scores = logits.sigmoid()
        known = torch.where(inputs.valid[..., None], logits.detach(), -torch.inf)
        chosen = self._chosen(inputs, known) & inputs.valid[..., None]
        by_head = chosen.transpose(1, 2), scores.transpose(1, 2)
        output, kept = self.sparse(inputs, *by_head)
        if inputs.keeping:
            earlier = inputs.history.get("logits")
            kept["logits"] = known if earlier is None else torch.cat([earlier, known], dim=1)
        routing = heads_routing(inputs, *by_head, logits, scores, kept)
        if self.num_dense:
            output = output + self.ordinary(inputs)[0]
        return output, None, routing

    def _chosen(self, inputs: AttentionInput, logits: Float[Tensor, "B Q H"]) -> Bool[Tensor, "B Q H"]:
        """Which heads a token is in, by its rank among its sequence's tokens, at inference those so far."""
        raised = logits
        if self.include_first:
            begins = (inputs.positions == 0) & inputs.valid
            raised = torch.where(begins[..., None], torch.inf, logits)
        if inputs.training:
            ranks, count = ranks_in_sequence(raised, inputs.sequence_ids)
        else:
            earlier = inputs.history.get("logits")
            ranks, count = ranks_before(raised, earlier, inputs.sequence_ids, self.include_first)
        return ranks < (count // self.sparsity).clamp(min=_LEAST)
