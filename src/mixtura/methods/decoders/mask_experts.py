"""Decoding without some experts."""

from __future__ import annotations

from typing import final

import torch

from mixtura.errors import UserError
from mixtura.methods.decoders import Branch, Decoder, Prompt, View
from mixtura.methods.decoders._shared import pairs_by_layer
from mixtura.types.steering import Steering

METHOD = {
    "paper": 69,
    "title": "Large Language Lobotomy: Jailbreaking Mixture-of-Experts via Expert Silencing",
    "tags": ["steers"],
}


@final
class MaskExperts(Decoder):
    """Let no token choose some experts: what does a model lose without them?

    ``experts`` are pairs of a decoder layer and an expert. Their logits become minus infinity, so that the
    router chooses among the others, as many as ever, and weighs them as if there were no more; nothing is
    written to the model.

    Shapes:
        E experts to those not masked.

    Raises:
        UserError: a layer or an expert is not there, or fewer are left than a token chooses.

    Cost:
        One forward pass a token, of one row: weights outside experts and K experts a layer are read once.

    Example:
        >>> from mixtura.authoring.contracts.decoders import sample_prompt
        >>> view = MaskExperts(experts=[[1, 0], [1, 3]]).open(sample_prompt())[0].views[0]
        >>> view.steering[1].allowed.nonzero().flatten().tolist()
        [1, 2, 4, 5, 6, 7]
        >>> view.steering[1].logits[:3].tolist()
        [-inf, 0.0, 0.0]

    Differences from the paper:
        Only the mask, by whatever experts an audit names. The paper masks until a model gives answers it
        should refuse; that search is left out on purpose. Where a router compares something else than its
        scores, such as scores with a correction or those of chosen groups, masked experts are left out of
        that, too.

    Reference:
        Large Language Lobotomy: Jailbreaking Mixture-of-Experts via Expert Silencing (paper 69).
    """

    def __init__(self, *, experts: list[list[int]] = []) -> None:  # noqa: B006 - never changed
        self.experts = experts

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        steering = {}
        for layer, masked in pairs_by_layer("MaskExperts", self.experts, prompt.facts).items():
            if layer.num_experts - len(masked) < layer.top_k:
                raise UserError(
                    f"experts of MaskExperts must leave the {layer.top_k} of layer {layer.index} that "
                    f"a token chooses, got {len(masked)} masked of {layer.num_experts}"
                )
            allowed = torch.ones(layer.num_experts, dtype=torch.bool)
            allowed[list(masked)] = False
            silenced = torch.zeros(layer.num_experts).masked_fill(~allowed, -torch.inf)
            steering[layer.index] = Steering(logits=silenced, allowed=allowed)
        return (Branch(views=(View(steering),)),)
