"""MoE++: beside the experts, tokens may choose to be dropped, copied or replaced by a vector."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact, exact_logits, full_precision
from mixtura.methods._scores import softmax, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import beside_unused, best, choice_shares
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 156,
    "title": "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts",
    "tags": ["token_independent", "lowest_index", "stateful", "reads:state"],
}


@final
class MoePlusPlus(Router):
    """Let tokens choose experts that compute nothing beside the real ones, by a gate that remembers.

    There are E real experts and ``num_constant + num_copy + num_zero`` free ones, n in all. A constant
    expert gives ``a1 * x + a2 * v`` with a vector v of its own and (a1, a2) a softmax of two products with
    x; a copy expert gives x, a zero expert nothing. What they give is added to the layer's output; an easy
    token thus uses fewer real experts. The gate is ``gate @ tanh(inner @ x)``, plus a
    linear map of the logits of the MoE layer before (its gating residual). Of the ``num_choices`` most
    probable the weights of zero experts are set to 0, then the rest divided by their sum; of equal
    probabilities real experts and lower indices go first. The loss ``balance`` is
    ``coefficient * n * sum_i eta_i * f_i * P_i`` over all n, with ``eta = tau`` for those that compute
    nothing: a smaller ``tau`` makes them cheap to crowd.

    Shapes:
        ``x [T, D]`` to at most ``T * num_choices`` assignments, ``state [T, n]``; parameters
        ``inner [8n, D]``, ``gate [n, 8n]``, ``residual [n, n]``, ``mix [num_constant, 2, D]``,
        ``constant [num_constant, D]``.

    Raises:
        SettingError: a number of experts is not in [0, 1024], ``num_choices`` not in [1, n], or ``tau`` or
            ``coefficient`` not in [0, 1e6].
        UserError: the state is not of n logits a token.

    Example:
        >>> router = MoePlusPlus(LayerShape(d_model=4, d_expert=8, num_experts=2))
        >>> routing = router(RouterInput.of(torch.eye(4)))
        >>> routing.state.shape, routing.extra.shape
        (torch.Size([4, 6]), torch.Size([4, 4]))

    Differences from the paper:
        Choices are a share of all rather than per token in the loss. The released code also doubles what
        goes into the experts; this does not. Its capacity by kind of expert is not here: what costs
        nothing needs no limit, and for the others there is the layer's ``Capacity``.

    Cost:
        The gate's inner layer has eight rows for each expert, as in the released code, so its product is
        eight times top-k's; the branch of those that compute nothing passes over all D features besides.

    Reference:
        MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts (paper 156); repository
        SkyworkAI/MoE-plus-plus.
    """

    choice_settings = ("num_choices",)

    def __init__(
        self,
        shape: LayerShape,
        *,
        num_choices: int = 2,
        num_constant: int = 2,
        num_copy: int = 1,
        num_zero: int = 1,
        tau: float = 0.75,
        coefficient: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        for name, value in (("constant", num_constant), ("copy", num_copy), ("zero", num_zero)):
            check_range("MoePlusPlus", f"num_{name}", value, 0, 1024)
        total = shape.num_experts + num_constant + num_copy + num_zero
        check_range("MoePlusPlus", "num_choices", num_choices, 1, total)
        check_range("MoePlusPlus", "tau", tau, 0, 1e6)
        check_range("MoePlusPlus", "coefficient", coefficient, 0, 1e6)
        self.num_choices, self.tau, self.coefficient, self.seed = num_choices, tau, coefficient, seed
        self.num_constant, self.num_copy, self.num_zero = num_constant, num_copy, num_zero
        self.inner = drawn(seed, 8 * total, shape.d_model)
        self.gate = drawn(seed + 1, total, 8 * total)
        self.residual = drawn(seed + 2, total, total)
        self.mix = drawn(seed + 3, num_constant, 2, shape.d_model)
        self.constant = drawn(seed + 4, num_constant, shape.d_model, scale=shape.d_model)

    def forward(self, inputs: RouterInput) -> Routing:
        num_experts, total = self.shape.num_experts, self.gate.shape[0]
        logits = exact_logits(exact_logits(inputs.x, self.inner).tanh(), self.gate)
        before = self.handed(inputs, total)
        if before is not None:
            logits = logits + exact_logits(before, self.residual)
        scores = softmax(logits)
        chosen = best(scores, self.num_choices)
        weights = to_sum_one(scores.gather(-1, chosen) * (chosen < total - self.num_zero))
        weights = beside_unused(weights, self.residual)
        used, likely = choice_shares(chosen, scores, inputs.valid)
        eta = torch.where(torch.arange(total, device=used.device) < num_experts, 1.0, self.tau)
        table = torch.zeros_like(scores).scatter(-1, chosen, weights)[:, num_experts:]
        return self.chose(
            inputs,
            chosen,
            weights,
            scores=scores[:, :num_experts],
            logits=logits[:, :num_experts],
            losses={"balance": self.coefficient * total * (eta.to(used) * used * likely).sum()},
            state=logits,
            extra=self._free(inputs, table),
        )

    @full_precision()
    def _free(self, inputs: RouterInput, table: Float[Tensor, "T Z"]) -> Float[Tensor, "T D"]:
        """What the experts that compute nothing add to the output."""
        x = exact(inputs.x)
        constant, rest = table.split([self.num_constant, table.shape[1] - self.num_constant], dim=-1)
        shares = exact_logits(x, self.mix.flatten(0, 1)).unflatten(-1, (self.num_constant, 2)).softmax(-1)
        of_x, of_vectors = (constant[..., None] * shares).unbind(-1)
        copied = of_x.sum(-1) + rest[:, : self.num_copy].sum(-1)
        output = torch.addcmul(of_vectors @ self.constant.to(of_vectors), copied[:, None], x.to(of_vectors))
        return torch.where(inputs.valid[:, None], output, 0.0).to(inputs.x.dtype)
