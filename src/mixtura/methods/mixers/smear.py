"""SMEAR: one expert a sequence, merged from all of them."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import check_range
from mixtura.methods._drawing import router_weight, uniform_like
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods._scores import masked, softmax
from mixtura.methods.mixers import Mixer
from mixtura.methods.mixers._shared import shares
from mixtura.types import ExpertsHandle, LayerShape, RouterInput, Routing

METHOD = {
    "paper": 104,
    "title": "Soft Merging of Experts with Adaptive Routing",
    "tags": ["looks_ahead", "reads:sequence_ids", "reads:training", "reads:generator"],
}

# Of the rows as they are drawn, and of what their norm multiplies them by at the start.
_DEVIATION = 0.01


@final
class Smear(Mixer):
    """Run one expert whose parameters are the mean of all experts' by a sequence's routing probabilities.

    The router sees the mean of the sequence's tokens, normed as a layer norm does, and its products with
    normed rows and a bias for each expert; their softmax weighs every matrix of every expert, and the merged
    expert computes each token of the sequence. In training each expert is left out of a sequence's mix with
    probability ``expert_dropout``, and the rest share its weight. It costs about one expert's arithmetic and
    gives the router a gradient without estimates.

    Shapes:
        ``x [T, D]`` to ``[T, D]``; parameters ``weight [E, D]``, ``bias [E]``, ``row_scale [D]`` and those of
        the norm of the mean token, ``[D]`` twice; merging makes one expert a sequence.

    Raises:
        SettingError: ``expert_dropout`` is not in [0, 0.99].

    Example:
        >>> from mixtura.modeling.layer import Experts
        >>> shape = LayerShape(d_model=4, d_expert=8, num_experts=2)
        >>> output, routing = Smear(shape)(RouterInput.of(torch.eye(4)), Experts(shape).matrices)
        >>> output.shape, bool((routing.scores == routing.scores[0]).all())
        (torch.Size([4, 4]), True)

    Differences from the paper:
        The router is that of the authors' code, with the settings of its published run; there experts are
        adapters, and a decoder's layers all route by the encoder's output. The norm of the rows has no
        bias, which would add the same to all of a sequence's logits. Where every expert of a sequence would
        be left out none is; there all then weigh the same. Padding counts nowhere, where theirs is part of
        the mean. Without sequence ids all tokens are of one sequence; without a generator none is left out.

    Reference:
        Soft Merging of Experts with Adaptive Routing (paper 104); repository r-three/smear.
    """

    def __init__(self, shape: LayerShape, *, expert_dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__(shape)
        check_range("Smear", "expert_dropout", expert_dropout, 0, 0.99)
        self.expert_dropout = expert_dropout
        self.seed = seed
        self.weight = router_weight(shape, seed, scale=_DEVIATION**2 * shape.d_model)
        self.bias = nn.Parameter(torch.zeros(shape.num_experts))
        self.row_scale = nn.Parameter(torch.full((shape.d_model,), _DEVIATION))
        self.norm = nn.LayerNorm(shape.d_model)

    def forward(self, inputs: RouterInput, experts: ExpertsHandle) -> tuple[Float[Tensor, "T D"], Routing]:
        rows = inputs.valid.nonzero().squeeze(-1)
        sequences, owners = inputs.sequences[rows].unique(return_inverse=True)
        counts = torch.bincount(owners, minlength=sequences.numel())
        x = exact(inputs.x)
        sums = x.new_zeros(sequences.numel(), x.shape[1]).index_add(0, owners, x[rows])
        logits = self._left_out(self._logits(sums / counts[:, None]), inputs)
        mix = softmax(logits)
        made = experts.merged(mix).run(inputs.x[rows], torch.arange(rows.numel()).to(rows), owners)
        output = torch.zeros_like(inputs.x).index_copy(0, rows, made.to(inputs.x.dtype))
        empty = logits.new_zeros(x.shape[0], self.shape.num_experts)
        routing = shares(
            empty.index_copy(0, rows, mix[owners]),
            logits=empty.index_copy(0, rows, logits[owners]),
            valid=inputs.valid,
        )
        return output, routing

    def _logits(self, means: Float[Tensor, "S D"]) -> Float[Tensor, "S E"]:
        size = (self.shape.d_model,)
        scale, bias = self.norm.weight.to(means), self.norm.bias.to(means)
        tokens = F.layer_norm(means, size, scale, bias, self.norm.eps)
        rows = F.layer_norm(exact(self.weight), size, exact(self.row_scale), None, self.norm.eps)
        return exact_logits(tokens, rows) + exact(self.bias)

    def _left_out(self, logits: Float[Tensor, "S E"], inputs: RouterInput) -> Float[Tensor, "S E"]:
        """The logits, minus infinity for experts that are left out of a sequence's mix."""
        if not inputs.training or inputs.generator is None or not self.expert_dropout:
            return logits
        return masked(logits, uniform_like(logits, inputs.generator) >= self.expert_dropout)
