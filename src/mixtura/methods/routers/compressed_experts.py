"""Compressed experts: a token's best experts run, and vectors of the next best change what these read."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from torch import nn

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact, plain_logits
from mixtura.methods._scores import masked, softmax, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best, present
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 18,
    "title": "Efficiently Editing Mixture-of-Experts Models with Compressed Experts",
    "tags": [
        "token_independent", "lowest_index", "expert_rows", "keeps_weights", "modulates",
        "reads:selection_bias", "reads:allowed",
    ],
}  # fmt: skip


@final
class CompressedExperts(Router):
    """Run each token's ``top_k`` best experts in full, and the next ``compressed`` ones as one vector each.

    Each expert has a vector of D numbers beside its matrices. The main experts of a token read it multiplied,
    feature by feature, by ``1 + the sum of w_a v_a`` over its auxiliary experts a, whose matrices do not run.
    Weights are those that a router of ``top_k + compressed`` experts would give, so that with vectors of
    zeros, as they begin, the layer is the trained one with its auxiliary experts left out.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments and a modulation ``[T, D]``; parameters ``weight [E, D]``
        and ``vectors [E, D]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E], or ``compressed`` not in [0, 65536].

    Example:
        >>> router = CompressedExperts(LayerShape(d_model=4, d_expert=8, num_experts=4), compressed=2)
        >>> routing = router(RouterInput.of(torch.eye(4)))
        >>> routing.token_ids.numel(), routing.modulation.unique().tolist()
        (4, [1.0])

    Differences from the paper:
        Only the abstract was at hand, which says that light modules stand for auxiliary experts; that
        they are vectors which multiply what the main experts read, and that they add up by the router's
        weights, is of a summary and ours. Which experts are main ones is decided token by token. Of fewer
        experts than ``top_k + compressed`` all others are compressed.

    Reference:
        Efficiently Editing Mixture-of-Experts Models with Compressed Experts (paper 18, abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 1,
        compressed: int = 1,
        renormalize: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.compressed = self.within("compressed", compressed, 0, 1 << 16)
        self.renormalize, self.seed = renormalize, seed
        self.weight = router_weight(shape, seed)
        self.vectors = nn.Parameter(torch.zeros(shape.num_experts, shape.d_model))

    def forward(self, inputs: RouterInput) -> Routing:
        logits = plain_logits(inputs.x, self.weight)
        scores = softmax(masked(logits, inputs.allowed))
        wanted = scores if inputs.selection_bias is None else scores + inputs.selection_bias
        wanted = masked(wanted, inputs.allowed)
        chosen = best(wanted, self.top_k + self.compressed)
        weights = scores.gather(-1, chosen)
        if self.renormalize:
            weights = to_sum_one(weights)
        main, others = chosen[:, : self.top_k], chosen[:, self.top_k :]
        vectors = exact(self.vectors)[others]
        modulation = 1 + torch.einsum("tk,tkd->td", weights[:, self.top_k :].to(vectors), vectors)
        routing = self.chose(
            inputs, present(main, wanted), weights[:, : self.top_k], scores=scores, logits=logits
        )
        return replace(routing, modulation=modulation.to(inputs.x.dtype))
