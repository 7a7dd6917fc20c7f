"""Soft MoE: every expert works on mixtures of all tokens of a sequence."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import check_range
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact, exact_logits, full_precision
from mixtura.methods.mixers import Mixer
from mixtura.methods.mixers._shared import shares
from mixtura.types import ExpertsHandle, LayerShape, RouterInput, Routing

METHOD = {
    "paper": 140,
    "title": "Routers in Vision Mixture of Experts: An Empirical Study",
    "tags": ["looks_ahead", "reads:sequence_ids"],
}


@final
class SoftMoe(Mixer):
    """Give each expert slots that are weighted means of a sequence's tokens, and mix what comes out.

    A slot's input is the mean of the sequence's tokens by a softmax over tokens (dispatch); a token's
    output is the mean of all slots' outputs by a softmax over slots (combine). Both read the same
    logits: the scaled cosine of token and slot. Nothing is chosen or dropped, every expert computes
    ``slots`` rows a sequence, and the whole is differentiable.

    Shapes:
        ``x [T, D]`` to ``[T, D]``; parameters ``phi [E * slots, D]`` and ``scale []``.

    Raises:
        SettingError: ``slots`` is not in [1, 4096].

    Example:
        >>> from mixtura.modeling.layer import Experts
        >>> shape = LayerShape(d_model=4, d_expert=8, num_experts=2)
        >>> output, routing = SoftMoe(shape)(RouterInput.of(torch.eye(4)), Experts(shape).matrices)
        >>> output.shape, routing.weights.sum().item()
        (torch.Size([4, 4]), 4.0)

    Differences from the paper:
        The study compares Soft MoE with sparse routers in one view of dispatch and combine weights; its
        layer is the one known as Soft MoE. Padding takes no part. Sequences are mixed one by one, so
        that none depends on the rest of the batch. In its record an expert's share is the sum of its slots'
        and its logit their ``logsumexp``, whose softmax that share is.

    Reference:
        Routers in Vision Mixture of Experts: An Empirical Study (paper 140).
    """

    def __init__(self, shape: LayerShape, *, slots: int = 1, seed: int = 0) -> None:
        super().__init__(shape)
        check_range("SoftMoe", "slots", slots, 1, 4096)
        self.slots = slots
        self.seed = seed
        self.phi = drawn(seed, shape.num_experts * slots, shape.d_model)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: RouterInput, experts: ExpertsHandle) -> tuple[Float[Tensor, "T D"], Routing]:
        x = exact(inputs.x)
        phi = exact(self.scale) * F.normalize(exact(self.phi), dim=-1)
        logits = exact_logits(F.normalize(x, dim=-1), phi)
        combine = logits.softmax(-1)
        output = torch.zeros_like(x)
        expert_ids = torch.arange(phi.shape[0], device=x.device) // self.slots
        for sequence in inputs.sequences[inputs.valid].unique():
            rows = ((inputs.sequences == sequence) & inputs.valid).nonzero().squeeze(-1)
            with full_precision():
                mixtures = logits[rows].softmax(0).T @ x[rows]
            made = experts.run(mixtures.to(inputs.x.dtype), torch.arange(phi.shape[0]).to(rows), expert_ids)
            with full_precision():
                output = output.index_copy(0, rows, combine[rows] @ made.to(x))
        by_expert = (-1, self.shape.num_experts, self.slots)
        routing = shares(
            combine.view(by_expert).sum(-1), logits=logits.view(by_expert).logsumexp(-1), valid=inputs.valid
        )
        return output.to(inputs.x.dtype), routing
