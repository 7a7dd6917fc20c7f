"""VQMoE: beside the routed experts, the expert that the nearest entry of a codebook points to."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import check_range
from mixtura.methods._drawing import drawn, router_weight
from mixtura.methods._precision import exact, exact_logits, full_precision
from mixtura.methods._scores import softmax, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best
from mixtura.types import ExpertsHandle, LayerShape, RouterInput, Routing

METHOD = {
    "paper": 143,
    "title": "On the effectiveness of discrete representations in sparse mixture of experts",
    "tags": ["token_independent", "lowest_index", "reads:experts", "reads:training"],
    "gaps": {
        "check_gradient_matches_differences": "the branch's gradient passes straight through the codes",
    },
}


@final
class VqMoe(Router):
    """Mix top-k routing with a branch whose expert is given by the token's nearest codebook entry.

    A token's nearest entry c of ``num_codes`` (Euclidean; of equally near ones the first) stands for it: the
    branch gives ``LN(E_{c mod E}(LN(q)))`` with q the token moved to the entry by the share ``contribution``
    and one layer norm for both. Equal tokens thus always meet the same expert, whatever the router does. A
    softmax of two products with the token weighs the routed experts (``top_k`` most probable, probabilities
    divided by their sum, of equal ones the lowest index) and the branch. The gradient passes straight
    through q to the token. The loss ``codes`` draws entries to their tokens (mean squared distance) and, by
    ``commitment``, tokens to their entries.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments, and as ``extra [T, D]`` the branch; parameters
        ``weight [E, D]``, ``codes [num_codes, D]``, ``mix [2, D]``, ``mix_bias [2]``, ``norm_weight [D]``,
        ``norm_bias [D]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E], ``num_codes`` not in [1, 1e6], ``contribution`` not in
            [0, 1], or ``commitment`` or ``coefficient`` not in [0, 1e6].
        UserError: the experts are not given.

    Example:
        >>> from mixtura.modeling.layer import Experts
        >>> shape = LayerShape(d_model=4, d_expert=8, num_experts=2)
        >>> inputs = RouterInput.of(torch.eye(4), experts=Experts(shape).matrices)
        >>> routing = VqMoe(shape, top_k=1)(inputs)
        >>> routing.load.sum().item(), routing.extra.shape
        (4, torch.Size([4, 4]))

    Differences from the paper:
        The branch runs the layer's experts as they are; the released code replaces their activation by a
        ReLU there. It also moves tokens by 0.1 to ``0.8 x + 0.1 q``; here ``contribution`` keeps the sum 1
        and is 1 by default, the usual quantisation. Entries start at the scale of 1 / num_codes as there.

    Cost:
        Beside top-k's product with E rows there is one with ``num_codes`` entries, and the branch runs an
        expert for every token; in training the way back through both and the loss come on top.

    Reference:
        On the effectiveness of discrete representations in sparse mixture of experts (paper 143);
        repository giangdip2410/VQMoE.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        num_codes: int = 512,
        contribution: float = 1.0,
        commitment: float = 0.25,
        coefficient: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_range("VqMoe", "top_k", top_k, 1, shape.num_experts)
        check_range("VqMoe", "num_codes", num_codes, 1, 1e6)
        check_range("VqMoe", "contribution", contribution, 0, 1)
        for name, value in {"commitment": commitment, "coefficient": coefficient}.items():
            check_range("VqMoe", name, value, 0, 1e6)
        self.top_k, self.num_codes, self.contribution = top_k, num_codes, contribution
        self.commitment, self.coefficient, self.seed = commitment, coefficient, seed
        self.weight = router_weight(shape, seed)
        self.codes = drawn(seed + 1, num_codes, shape.d_model, scale=shape.d_model / num_codes**2)
        self.mix = drawn(seed + 2, 2, shape.d_model)
        self.mix_bias = nn.Parameter(torch.zeros(2))
        self.norm_weight = nn.Parameter(torch.ones(shape.d_model))
        self.norm_bias = nn.Parameter(torch.zeros(shape.d_model))

    def forward(self, inputs: RouterInput) -> Routing:
        experts: ExpertsHandle = inputs.need("experts", "VqMoe")
        logits = exact_logits(inputs.x, self.weight)
        scores = softmax(logits)
        chosen = best(scores, self.top_k)
        mix = softmax(exact_logits(inputs.x, self.mix) + self.mix_bias)
        weights = mix[:, :1] * to_sum_one(scores.gather(-1, chosen))

        rows = inputs.valid.nonzero().squeeze(-1)
        x, codes = exact(inputs.x)[rows], exact(self.codes)
        codes = codes.to(x)
        # Squared distances but for the token's own square, which is the same for every entry.
        with full_precision():
            nearest = torch.addmm(codes.square().sum(-1), x, codes.T, alpha=-2).detach().argmin(-1)
        found = codes[nearest]
        q = self._normed(x + self.contribution * (found - x).detach()).to(inputs.x.dtype)
        made = experts.run(
            q, torch.arange(rows.numel(), device=rows.device), nearest % self.shape.num_experts
        )
        branch = mix[rows, 1:] * self._normed(exact(made))
        return self.chose(
            inputs,
            chosen,
            weights,
            scores=scores,
            logits=logits,
            losses={"codes": self.coefficient * self._apart(x, found)} if inputs.training else {},
            extra=torch.zeros_like(inputs.x).index_copy(0, rows, branch.to(inputs.x.dtype)),
        )

    def _apart(self, x: Tensor, found: Tensor) -> Tensor:
        """What draws entries to their tokens and tokens to their entries."""
        pulled = F.mse_loss(found, x.detach(), reduction="sum") / max(x.numel(), 1)
        return pulled + self.commitment * F.mse_loss(x, found.detach(), reduction="sum") / max(x.numel(), 1)

    def _normed(self, values: Tensor) -> Tensor:
        weight, bias = self.norm_weight.to(values), self.norm_bias.to(values)
        return F.layer_norm(values, values.shape[-1:], weight, bias)
