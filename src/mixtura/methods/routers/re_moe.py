"""ReMoE: a ReLU instead of softmax and top-k, so that routing is differentiable everywhere."""

from __future__ import annotations

from typing import final

from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods.routers import Router
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 122,
    "title": "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing",
    "tags": ["expert_rows", "token_independent"],
}


@final
class ReMoe(Router):
    """Weigh each expert by the ReLU of its logit; experts with weight 0 are not used.

    Nothing is chosen, normalised or compared: an expert is active for a token exactly if its logit is
    positive, and as its weight goes to 0 continuously, experts come and go without a jump. How many are
    active is not fixed, but held at a target by the balancer ``re_moe_l1``, which also evens out the load;
    without it about half of the experts are active at first.

    Shapes:
        ``x [T, D]`` to between 0 and ``T * E`` assignments; one parameter, ``weight [E, D]``.

    Example:
        >>> import torch
        >>> router = ReMoe(LayerShape(d_model=2, d_expert=8, num_experts=3))
        >>> with torch.no_grad():
        ...     _ = router.weight.copy_(torch.tensor([[1.0, 0.0], [0.5, 0.0], [-1.0, 0.0]]))
        >>> routing = router(RouterInput.of(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])))
        >>> routing.token_ids.tolist(), routing.expert_ids.tolist(), routing.weights.tolist()
        ([0, 0, 1], [0, 1, 2], [1.0, 0.5, 2.0])

    Differences from the paper:
        None in the router. A token may have no active expert; it then passes by the layer.

    Reference:
        ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing (paper 122); repository
        thu-ml/ReMoE.
    """

    def __init__(self, shape: LayerShape, *, seed: int = 0) -> None:
        super().__init__(shape)
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        scores = logits.relu()
        token_ids, expert_ids = (scores > 0).nonzero(as_tuple=True)
        return Routing.from_assignments(
            token_ids,
            expert_ids,
            scores[token_ids, expert_ids].to(inputs.x.dtype),
            scores=scores,
            logits=logits,
            valid=inputs.valid,
        )
