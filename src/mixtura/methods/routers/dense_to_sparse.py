"""Dense-to-sparse gate: a softmax whose temperature falls, from all experts to few."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_weighed
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 183,
    "title": "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?",
    "tags": ["normalized", "token_independent", "lowest_index", "keeps_weights", "reads:step"],
}


@final
class DenseToSparse(Router):
    """Begin with nearly all experts for each token and end with few, by the temperature of the softmax.

    The probabilities are ``softmax(activation(logits) / temperature)``. The temperature falls
    geometrically from ``start`` to ``end`` over the first ``num_steps`` optimizer steps and stays there. A
    token uses the experts whose probability is at least ``threshold`` times the even share 1 / E, and the
    most probable one always; their probabilities are divided by their sum. An ``activation`` before the
    softmax unties temperature and weights, which the paper shows to make their estimates converge at
    polynomial rates; ``"none"`` is the plain gate, where scaling temperature and weights alike changes
    nothing. Of equal probabilities the lowest index is the one always used.

    Shapes:
        ``x [T, D]`` to between T and ``T * E`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``start`` or ``end`` is not in [1e-3, 1e3], ``num_steps`` not in [1, 1e8], or
            ``threshold`` not in [0, 1e6].

    Example:
        >>> shape = LayerShape(d_model=4, d_expert=8, num_experts=3)
        >>> router = DenseToSparse(shape, end=0.001, num_steps=10)
        >>> [router(RouterInput.of(torch.eye(4), step=step)).load.sum().item() for step in (0, 10)]
        [12, 4]

    Differences from the paper:
        The paper analyses the gate at a fixed temperature; the schedule and the threshold, which makes a
        small probability none, are ours. The threshold goes by the even share, because at a high temperature
        all probabilities are near it, however many experts there are. Only the abstract was at hand.

    Reference:
        Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts? (paper 183, abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        start: float = 2.0,
        end: float = 0.05,
        num_steps: int = 1000,
        threshold: float = 0.4,
        activation: Literal["none", "sigmoid", "tanh", "gelu"] = "sigmoid",
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.start = self.within("start", start, 1e-3, 1e3)
        self.end = self.within("end", end, 1e-3, 1e3)
        self.num_steps = self.within("num_steps", num_steps, 1, 1e8)
        self.threshold = self.within("threshold", threshold, 0, 1e6)
        self.activation = activation
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = self._activated(exact_logits(inputs.x, self.weight)) / self.temperature(inputs.step)
        scores = softmax(logits)
        chosen, weights = best_weighed(scores, self.shape.num_experts, renormalize=False)
        first = torch.arange(self.shape.num_experts, device=chosen.device) == 0
        kept = (weights >= self.threshold / self.shape.num_experts) | first
        weights = to_sum_one(weights * kept)
        return self.chose(
            inputs, chosen.masked_fill(~kept, self.shape.num_experts), weights, scores=scores, logits=logits
        )

    def temperature(self, step: int) -> float:
        """What logits are divided by after so many optimizer steps."""
        share = min(step / self.num_steps, 1.0)
        fallen: float = self.start * (self.end / self.start) ** share
        return fallen

    def _activated(self, logits: Tensor) -> Tensor:
        if self.activation == "none":
            return logits
        if self.activation == "gelu":
            return F.gelu(logits)
        return logits.sigmoid() if self.activation == "sigmoid" else logits.tanh()
