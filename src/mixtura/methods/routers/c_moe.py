"""CMoE: experts are scored by neurons that stand for them, and count in full."""

from __future__ import annotations

from typing import final

import torch
from torch import nn

from mixtura.errors import check_range
from mixtura.methods._activations import swiglu
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods._scores import masked, softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best, present
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 80,
    "title": "CMoE: Fast Carving of Mixture-of-Experts for Efficient LLM Inference",
    "tags": ["token_independent", "lowest_index", "reads:selection_bias", "reads:allowed"],
}


@final
class CMoe(Router):
    """Score each expert by how much one neuron of a dense model that stands for it would be activated.

    The router of a dense feed-forward part that was cut into experts without training (analytic router): an
    expert's score is the softmax over experts of the absolute activation ``silu(gate x) * (up x)`` of its
    representative. The ``top_k`` of highest score, a ``selection_bias`` of loss-free balancing added to
    choose, are weighted by ``1 + score * scale``, with a trained ``scale`` that begins as ``start``: at 0
    what is added up is what the dense part would have added up. Of equal scores the lowest index wins.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; parameters ``gate [E, D]``, ``up [E, D]`` and
        ``scale [E]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E] or ``start`` not in [-1e3, 1e3].

    Example:
        >>> router = CMoe(LayerShape(d_model=2, d_expert=8, num_experts=2), top_k=1, start=0.0)
        >>> with torch.no_grad():
        ...     _ = router.gate.copy_(torch.eye(2)), router.up.copy_(torch.eye(2))
        >>> routing = router(RouterInput.of(torch.tensor([[0.1, 2.0], [3.0, 0.2]])))
        >>> routing.expert_ids.tolist(), routing.weights.tolist()
        ([0, 1], [1.0, 1.0])

    Differences from the paper:
        There rows are always those of a dense model, and the scale begins at 0; so the upcycler ``c_moe`` has
        it. In a new model rows are drawn, and ``start`` is 1, without which no gradient reaches them. The
        released code changes the bias inside the router, in bfloat16; here that is the balancer
        ``loss_free``. The rule for equal scores is made explicit.

    Reference:
        CMoE: Fast Carving of Mixture-of-Experts for Efficient LLM Inference (paper 80); repository
        JarvisPei/CMoE, ``CMoE_model.py``.
    """

    def __init__(self, shape: LayerShape, *, top_k: int = 2, start: float = 1.0, seed: int = 0) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        check_range("CMoe", "start", start, -1e3, 1e3)
        self.start, self.seed = start, seed
        self.gate = drawn(seed, shape.num_experts, shape.d_model)
        self.up = drawn(seed + 1, shape.num_experts, shape.d_model)
        self.scale = nn.Parameter(torch.full((shape.num_experts,), float(start)))

    def forward(self, inputs: RouterInput) -> Routing:
        both = exact_logits(inputs.x, torch.cat([self.gate, self.up]))
        logits = swiglu(both).abs()
        scores = softmax(logits)
        wanted = scores if inputs.selection_bias is None else scores + inputs.selection_bias
        wanted = masked(wanted, inputs.allowed)
        chosen = best(wanted, self.top_k)
        weights = (1 + scores * exact(self.scale)).gather(-1, chosen)
        weights = weights.masked_fill(wanted.gather(-1, chosen).isneginf(), 0.0)
        return self.chose(inputs, present(chosen, wanted), weights, scores=scores, logits=logits)
