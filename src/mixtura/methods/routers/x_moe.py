"""X-MoE: cosines to expert embeddings in a space of few dimensions."""

from __future__ import annotations

import math
from typing import Literal, final

import torch
from torch import nn

from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods._scores import softmax, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best, cosine_logits
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 57,
    "title": "On the Representation Collapse of Sparse Mixture of Experts",
    "tags": ["token_independent", "lowest_index"],
}


@final
class XMoe(Router):
    """Compare tokens and experts on a sphere of few dimensions, so that tokens do not collapse.

    Tokens are projected to ``num_dims`` dimensions; an expert's logit is the cosine of the projected
    token and the expert's embedding, over a temperature that is learned. The ``top_k`` experts of
    highest logit are chosen, of equal ones that of lowest index. Scores are a softmax over the experts
    or a sigmoid of each (``gate``), and weigh the outputs, divided by their sum if ``renormalize``.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; parameters ``project [R, D]`` (R = ``num_dims``),
        ``embeddings [E, R]`` and ``log_temperature []``.

    Raises:
        SettingError: ``top_k`` is not in [1, E], ``num_dims`` not in [1, 1e6], or ``temperature``, the
            one at the start, not in [1e-3, 1e3].

    Example:
        >>> router = XMoe(LayerShape(d_model=4, d_expert=8, num_experts=3), num_dims=2)
        >>> x = torch.ones(1, 4)
        >>> torch.allclose(router(RouterInput.of(x)).logits, router(RouterInput.of(9 * x)).logits)
        True

    Differences from the paper:
        The temperature is kept as its logarithm, so that it stays positive. The authors' library
        normalises expert embeddings only and rescales them before each forward; here, as the abstract
        says, both sides lie on the sphere. It also draws the second of two experts by Gumbel noise.

    Reference:
        On the Representation Collapse of Sparse Mixture of Experts (paper 57, abstract);
        microsoft/torchscale, as summarised.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 1,
        num_dims: int = 16,
        temperature: float = 0.3,
        gate: Literal["softmax", "sigmoid"] = "softmax",
        renormalize: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.num_dims = self.within("num_dims", num_dims, 1, 1e6)
        self.temperature = self.within("temperature", temperature, 1e-3, 1e3)
        self.gate = gate
        self.renormalize = renormalize
        self.seed = seed
        self.project = drawn(seed, num_dims, shape.d_model)
        self.embeddings = drawn(seed + 1, shape.num_experts, num_dims)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(self, inputs: RouterInput) -> Routing:
        projected = exact_logits(inputs.x, self.project)
        logits = cosine_logits(projected, self.embeddings, exact(self.log_temperature).exp())
        scores = softmax(logits) if self.gate == "softmax" else torch.sigmoid(logits)
        chosen = best(logits, self.top_k)
        weights = scores.gather(-1, chosen)
        if self.renormalize:
            weights = to_sum_one(weights)
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits)
