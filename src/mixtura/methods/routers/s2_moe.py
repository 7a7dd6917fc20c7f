"""S2MoE: experts learn from each token and from a noisy copy of it, and a gate mixes the two."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._drawing import drawn, normal_like, router_weight
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods._scores import softmax, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._losses import contrast
from mixtura.methods.routers._shared import best
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 141,
    "title": "S2MoE: Robust Sparse Mixture of Experts via Stochastic Learning",
    "tags": [
        "token_independent",
        "lowest_index",
        "keeps_weights",
        "reads:training",
        "reads:generator",
        "reads:experts",
    ],
}


@final
class S2Moe(Router):
    """In training also route a noised copy of each token, and mix both outputs by a learned gate.

    The copy is ``x * (1 + scale_noise * n1) + shift_noise * n2`` with standard normal n1, n2. Both are
    routed by the same rows, to the ``top_k`` most probable experts with probabilities divided by their sum,
    of equal ones the lowest index. The output is ``g * clean + (1 - g) * noised`` with g a sigmoid of a
    product with x. The loss ``uncertainty`` (InfoNCE) asks that a token's two outputs be more alike, by
    cosine over ``temperature``, than its clean one to others' noised ones in blocks of 256 tokens. Without
    training or generator only the clean token is routed, to ``inference_top_k`` experts: what was learned
    under noise is to need fewer of them.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments, and ``extra [T, D]``; parameters ``weight [E, D]`` and
        ``gate [1, D]``. In training experts run three times: in the layer, on the copy and for the loss.

    Raises:
        SettingError: ``top_k`` or ``inference_top_k`` is not in [1, E], a noise or ``coefficient`` not in
            [0, 1e6], or ``temperature`` not in [1e-3, 1e3].
        UserError: the experts are not given in training.

    Example:
        >>> router = S2Moe(LayerShape(d_model=4, d_expert=8, num_experts=3), inference_top_k=1)
        >>> routing = router(RouterInput.of(torch.eye(4)))
        >>> routing.load.sum().item(), routing.extra is None
        (4, True)

    Differences from the paper:
        Only the abstract and a summary were at hand: the forms of noise, gate and loss are ours.

    Cost:
        In training experts run twice within the router, on the noised copy and for the loss on the token
        itself, which takes far longer than choosing. Inference is as fast as top-k.

    Reference:
        S2MoE: Robust Sparse Mixture of Experts via Stochastic Learning (paper 141, abstract).
    """

    choice_settings = ("top_k", "inference_top_k")

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        inference_top_k: int = 2,
        scale_noise: float = 0.1,
        shift_noise: float = 0.1,
        temperature: float = 0.1,
        coefficient: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_range("S2Moe", "top_k", top_k, 1, shape.num_experts)
        check_range("S2Moe", "inference_top_k", inference_top_k, 1, shape.num_experts)
        for name, value in {"scale_noise": scale_noise, "shift_noise": shift_noise}.items():
            check_range("S2Moe", name, value, 0, 1e6)
        check_range("S2Moe", "coefficient", coefficient, 0, 1e6)
        check_range("S2Moe", "temperature", temperature, 1e-3, 1e3)
        self.top_k, self.inference_top_k, self.seed = top_k, inference_top_k, seed
        self.scale_noise, self.shift_noise = scale_noise, shift_noise
        self.temperature, self.coefficient = temperature, coefficient
        self.weight = router_weight(shape, seed)
        self.gate = drawn(seed + 1, 1, shape.d_model)

    def forward(self, inputs: RouterInput) -> Routing:
        generator = inputs.generator if inputs.training else None
        top_k = self.inference_top_k if generator is None else self.top_k
        logits, scores, chosen, weights = self._routed(inputs.x, top_k)
        losses, extra = {}, None
        if generator is not None:
            x, rows = exact(inputs.x), inputs.valid.nonzero().squeeze(-1)
            copy = x * (1 + self.scale_noise * normal_like(x, generator))
            copy = (copy + self.shift_noise * normal_like(x, generator)).to(inputs.x.dtype)[rows]
            clean = self._output(inputs, inputs.x[rows], chosen[rows], weights[rows])
            other = self._output(inputs, copy, *self._routed(copy, self.top_k)[2:])
            gate = exact_logits(inputs.x, self.gate).sigmoid()
            weights = gate * weights
            extra = torch.zeros_like(x).index_copy(0, rows, (1 - gate[rows]) * other).to(inputs.x.dtype)
            losses["uncertainty"] = self.coefficient * contrast(clean, other, self.temperature)
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits, losses=losses, extra=extra)

    def _routed(self, x: Float[Tensor, "T D"], top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = exact_logits(x, self.weight)
        scores = softmax(logits)
        chosen = best(scores, top_k)
        return logits, scores, chosen, to_sum_one(scores.gather(-1, chosen))

    def _output(self, inputs: RouterInput, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        owners = torch.arange(x.shape[0], device=x.device).repeat_interleave(chosen.shape[1])
        made = exact(inputs.need("experts", "S2Moe").run(x, owners, chosen.flatten()))
        return (weights[..., None] * made.view(*chosen.shape, x.shape[1])).sum(1)
