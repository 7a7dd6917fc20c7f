"""IDA-MoE: experts own regions of the input space, learned as a mixture of Gaussians apart from the task."""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import check_range
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact, exact_logits, full_precision
from mixtura.methods._scores import mean_of_valid
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_weighed
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 49,
    "title": (
        "Input Domain Aware MoE: Decoupling Routing Decisions from Task Optimization in Mixture of Experts"
    ),
    "tags": ["normalized", "token_independent", "reads:training"],
    "gaps": {
        "check_gradient_matches_differences": "by design the task's gradient stops at the weights: "
        "routing is trained by likelihood alone",
    },
}

# The narrowest a Gaussian becomes, in units of the codes: tokens that repeat would make it a point.
_LEAST = 1e-4


@final
class IdaMoe(Router):
    """Route by which expert's Gaussians a token most likely comes from, learned by likelihood alone.

    Tokens, cut off from the gradient and scaled to unit mean square, are encoded to ``num_dims`` numbers;
    each expert owns ``num_groups`` Gaussians with diagonal covariance there. An expert's score is the
    posterior of its Gaussians; the ``top_k`` experts of highest posterior are chosen and weighted by
    it, over their sum. Two losses alone train the router: the error of decoding the tokens again
    (``reconstruction``), and the encoded ones' negative log-likelihood (``likelihood``, nats a dimension).

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; parameters ``encoder [R, D]``, ``decoder [D, R]``,
        ``means [E*G, R]``, ``log_deviations [E*G, R]``, ``mixing [E*G]`` (R dimensions, G groups).

    Raises:
        SettingError: ``top_k`` is not in [1, E], ``num_groups`` not in [1, 1e4], ``num_dims`` not in
            [1, 1e5], or a coefficient not in [0, 1e6].

    Example:
        >>> router = IdaMoe(LayerShape(d_model=4, d_expert=8, num_experts=3), num_dims=2)
        >>> routing = router(RouterInput.of(torch.eye(4), training=True))
        >>> sorted(routing.losses), routing.weights.requires_grad
        (['likelihood', 'reconstruction'], False)

    Differences from the paper:
        Written from the abstract and a summary: that encoder and decoder are linear, the scaling of
        tokens, the least deviation of 1e-4 and the coefficients are ours.

    Cost:
        With a single token a call what counts is that all ``E * num_groups`` precisions are made, and the
        number of operations; many tokens take up to twice top-k's time, for densities of all Gaussians.

    Reference:
        Input Domain Aware MoE: Decoupling Routing Decisions from Task Optimization in Mixture of Experts
        (paper 49, abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        num_groups: int = 16,
        num_dims: int = 16,
        likelihood_coefficient: float = 0.1,
        reconstruction_coefficient: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_range("IdaMoe", "top_k", top_k, 1, shape.num_experts)
        check_range("IdaMoe", "num_groups", num_groups, 1, 1e4)
        check_range("IdaMoe", "num_dims", num_dims, 1, 1e5)
        check_range("IdaMoe", "likelihood_coefficient", likelihood_coefficient, 0, 1e6)
        check_range("IdaMoe", "reconstruction_coefficient", reconstruction_coefficient, 0, 1e6)
        self.top_k, self.num_groups, self.num_dims, self.seed = top_k, num_groups, num_dims, seed
        self.likelihood_coefficient = likelihood_coefficient
        self.reconstruction_coefficient = reconstruction_coefficient
        count = shape.num_experts * num_groups
        self.encoder = drawn(seed, num_dims, shape.d_model)
        self.decoder = drawn(seed + 1, shape.d_model, num_dims)
        self.means = drawn(seed + 2, count, num_dims, scale=num_dims)
        self.log_deviations = nn.Parameter(torch.zeros(count, num_dims))
        self.mixing = nn.Parameter(torch.zeros(count))

    def forward(self, inputs: RouterInput) -> Routing:
        x = F.rms_norm(exact(inputs.x.detach()), (self.shape.d_model,))
        encoded = exact_logits(x, self.encoder)
        # Detached, for the encoder would raise the likelihood by shrinking all codes to a point.
        joint = self._log_density(encoded.detach()).unflatten(-1, (-1, self.num_groups)).logsumexp(-1)
        scores = joint.detach().softmax(-1)
        chosen, weights = best_weighed(scores, self.top_k)
        return self.chose(
            inputs,
            chosen,
            weights,
            scores=scores,
            logits=joint.detach(),
            losses=self._losses(x, encoded, joint, inputs) if inputs.training else {},
        )

    def _losses(
        self,
        x: Float[Tensor, "T D"],
        encoded: Float[Tensor, "T R"],
        joint: Float[Tensor, "T E"],
        inputs: RouterInput,
    ) -> dict[str, Tensor]:
        error = (exact_logits(encoded, self.decoder) - x).square().mean(-1)
        surprise = -joint.logsumexp(-1) / self.num_dims
        return {
            "likelihood": self.likelihood_coefficient * mean_of_valid(surprise, inputs.valid),
            "reconstruction": self.reconstruction_coefficient * mean_of_valid(error, inputs.valid),
        }

    @full_precision()
    def _log_density(self, codes: Float[Tensor, "T R"]) -> Float[Tensor, "T EG"]:
        """The logarithm of each Gaussian's share of the mixture's density at each code."""
        means, variance = self.means.double(), torch.exp(2 * self.log_deviations.double()) + _LEAST**2
        # Narrow Gaussians take differences of numbers far larger than what is left of them.
        known, precision = codes.double(), 1 / variance
        distance = known.square() @ precision.T - 2 * known @ (means * precision).T
        distance = distance + (means.square() * precision).sum(-1)
        scale = 0.5 * (variance.log().sum(-1) + self.num_dims * math.log(2 * math.pi))
        return (F.log_softmax(self.mixing.double(), dim=-1) - scale - 0.5 * distance).to(codes)
