"""pMoE: every expert takes its best patches of each image, or tokens of each sequence."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import rank_in_sequence
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 116,
    "title": (
        "Patch-level Routing in Mixture-of-Experts is Provably Sample-efficient for Convolutional Neural "
        "Networks"
    ),
    "tags": ["expert_rows", "looks_ahead", "reads:sequence_ids"],
}


@final
class PMoe(Router):
    """Let every expert take its ``patches`` best tokens of each sequence: an image's patches, say.

    An expert's router scores the tokens of a sequence by a product with one row; the highest are taken
    whatever other experts take, so that a token that matters to none goes nowhere, and all experts are
    equally busy. Weights are a softmax over tokens, not over experts: over those the expert took
    (``weights="taken"``), or over all of the sequence (``"all"``). Of equal scores the earlier token is
    taken; a sequence shorter than ``patches`` is taken whole. There is no rule for decoding. It is slower
    than top-k because every expert sorts all tokens.

    Shapes:
        ``x [T, D]`` of S sequences to at most ``S * E * patches`` assignments; one parameter,
        ``weight [E, D]``.

    Raises:
        SettingError: ``patches`` is not in [1, 1e6].

    Example:
        >>> router = PMoe(LayerShape(d_model=4, d_expert=8, num_experts=2), patches=3)
        >>> router(RouterInput.of(torch.eye(4))).load.tolist()
        [3, 3]

    Differences from the paper:
        Experts there are convolutions with a head of their own and outputs are summed over patches; here
        each token keeps its own output. Routers and experts are trained together; training routers
        first, as the theory does, is left to the trainer. ``scores`` are the softmax over all tokens of
        the sequence, per expert. The paper's code for wide networks takes that softmax as weights too.

    Reference:
        Patch-level Routing in Mixture-of-Experts is Provably Sample-efficient for Convolutional Neural
        Networks (paper 116, abstract); ``gate`` in nowazrabbani/pMoE_CNN.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        patches: int = 4,
        weights: Literal["taken", "all"] = "taken",
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.patches = self.within("patches", patches, 1, 1e6)
        self.weights = weights
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        sequences = inputs.sequences
        places = rank_in_sequence(logits, inputs.valid, sequences)
        usable = inputs.valid[:, None].expand_as(logits)
        taken = (places < self.patches) & usable
        scores = _softmax_over_tokens(logits, usable, sequences)
        weights = scores if self.weights == "all" else _softmax_over_tokens(logits, taken, sequences)
        token_ids, expert_ids = taken.nonzero(as_tuple=True)
        return Routing.from_assignments(
            token_ids,
            expert_ids,
            weights[token_ids, expert_ids].to(inputs.x.dtype),
            scores=scores,
            logits=logits,
            valid=inputs.valid,
        )


def _softmax_over_tokens(
    logits: Float[Tensor, "T E"], kept: Bool[Tensor, "T E"], sequences: Tensor
) -> Float[Tensor, "T E"]:
    """For each sequence and expert a softmax over the tokens kept; 0 for others."""
    count = int(sequences.max()) + 1 if sequences.numel() else 0
    known = logits.masked_fill(~kept, -torch.inf)
    owners = sequences[:, None].expand_as(logits)
    peak = logits.new_full((count, logits.shape[1]), -torch.inf)
    peak = peak.scatter_reduce(0, owners, known.detach(), "amax")
    # What is not kept must not be computed with either: an infinite power has no gradient of 0.
    power = torch.where(kept, logits - peak[sequences], -torch.inf).exp()
    total = torch.zeros_like(peak).index_add(0, sequences, power)
    return power / torch.where(kept, total[sequences], 1.0)
