"""Sinkhorn routing: choices balanced over the batch by entropic transport while training."""

from __future__ import annotations

from typing import final

import torch

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best, sinkhorn
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": None,
    "title": "Top-k of a Sinkhorn transport plan over the batch",
    "tags": [
        "looks_ahead",
        "causal_inference",
        "batch_dependent",
        "keeps_weights",
        "reads:training",
    ],
}


@final
class Sinkhorn(Router):
    """Choose by a transport plan that gives all experts equally many tokens of the batch; weigh as usual.

    In training the logits of all valid tokens are scaled by Sinkhorn's iterations until rows sum to 1 and
    columns come near to an equal share; each token takes the ``top_k`` experts of its row. The plan has
    no gradient: an expert's output is weighted by the sigmoid of its logit when ``top_k`` is 1, by its
    softmax probability otherwise. Outside training each token takes the experts of highest logit, so it
    depends on no other. Of equal entries the lowest index wins. Each iteration goes over all entries
    twice, which makes training slower than top-k; inference is not.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E], ``num_iterations`` not in [1, 1000] or ``temperature``
            not in [1e-3, 1e3].

    Example:
        >>> router = Sinkhorn(LayerShape(d_model=4, d_expert=8, num_experts=2), num_iterations=100)
        >>> x = torch.ones(6, 4) + torch.arange(6.0)[:, None]
        >>> [router(RouterInput.of(x, training=on)).load.max().item() for on in (False, True)]
        [6, 3]

    Differences from the paper:
        There is no one paper. This is the Sinkhorn router of Megatron-LM with a fixed number of
        iterations, in the log domain, instead of iterations until the change is small; padding has no
        part in the plan.

    Reference:
        ``sinkhorn_load_balancing`` of Megatron-LM's ``TopKRouter``.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 1,
        num_iterations: int = 30,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.num_iterations = self.within("num_iterations", num_iterations, 1, 1000)
        self.temperature = self.within("temperature", temperature, 1e-3, 1e3)
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        scores = softmax(logits)
        wanted = logits.detach()
        if inputs.training:
            wanted = sinkhorn(
                wanted, inputs.valid, num_iterations=self.num_iterations, temperature=self.temperature
            )
        chosen = best(wanted, self.top_k)
        gates = torch.sigmoid(logits) if self.top_k == 1 else scores
        return self.chose(inputs, chosen, gates.gather(-1, chosen), scores=scores, logits=logits)
