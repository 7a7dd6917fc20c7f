"""Noisy top-k: the gate of the first sparsely-gated MoE layers, with its two balancing losses."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods._drawing import normal_like, router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax, squared_variation
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": None,
    "title": "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
    "tags": [
        "normalized",
        "token_independent",
        "lowest_index",
        "keeps_weights",
        "reads:training",
        "reads:generator",
    ],
}


@final
class NoisyTopK(Router):
    """Add learned Gaussian noise to the logits in training, keep the top k, softmax over those.

    Noise makes tokens try experts they would not have chosen; its size is learned per token and expert.
    Two losses even out the experts: the squared coefficient of variation of their summed weights
    (``importance``), and of the number of tokens each is likely to get when the noise is drawn anew
    (``load``), which has a gradient. Without training or generator there is no noise and no load loss.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; parameters ``weight [E, D]`` and ``noise [E, D]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E], or a coefficient not in [0, 1e6].

    Example:
        >>> router = NoisyTopK(LayerShape(d_model=4, d_expert=8, num_experts=3), top_k=2)
        >>> routing = router(RouterInput.of(torch.eye(4), training=True, generator=torch.Generator()))
        >>> routing.load.sum().item(), sorted(routing.losses)
        (8, ['importance', 'load'])

    Differences from the paper:
        ``weight`` starts from small random numbers instead of zeros, so that the router is defined
        without noise too; ``noise`` starts from zeros as there.

    Cost:
        In training there is a second product of the same size, for the noise, and the load loss needs a
        normal distribution's value for every token and expert. Inference is as fast as top-k.

    Reference:
        Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        importance_coefficient: float = 0.1,
        load_coefficient: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.importance_coefficient = self.within("importance_coefficient", importance_coefficient, 0, 1e6)
        self.load_coefficient = self.within("load_coefficient", load_coefficient, 0, 1e6)
        self.seed = seed
        self.weight = router_weight(shape, seed)
        self.noise = nn.Parameter(torch.zeros(shape.num_experts, shape.d_model))

    def forward(self, inputs: RouterInput) -> Routing:
        clean = exact_logits(inputs.x, self.weight)
        losses = {}
        logits = clean
        if inputs.training and inputs.generator is not None:
            spread = F.softplus(exact_logits(inputs.x, self.noise)) + 1e-2
            logits = clean + spread * normal_like(clean, inputs.generator)
            load = self._expected_load(clean, logits, spread, inputs.valid)
            losses["load"] = self.load_coefficient * squared_variation(load)
        chosen = best(logits, self.top_k)
        weights = logits.gather(-1, chosen).softmax(-1)
        shared = torch.zeros_like(logits).scatter(-1, chosen, weights)
        losses["importance"] = self.importance_coefficient * squared_variation(shared[inputs.valid].sum(0))
        return self.chose(inputs, chosen, weights, scores=softmax(logits), logits=logits, losses=losses)

    def _expected_load(self, clean: Tensor, noisy: Tensor, spread: Tensor, valid: Tensor) -> Tensor:
        """Tokens each expert would get, in expectation over its own noise, that of others as drawn."""
        if self.top_k == self.shape.num_experts:
            return valid.sum().to(clean).expand(self.shape.num_experts)
        ordered = noisy.sort(-1, descending=True).values
        inside = noisy >= ordered[:, self.top_k - 1, None]
        # What an expert must beat: the k-th highest of the others.
        bar = torch.where(inside, ordered[:, self.top_k, None], ordered[:, self.top_k - 1, None])
        chance: Tensor = torch.special.ndtr((clean - bar) / spread)
        return chance[valid].sum(0)
