"""MixER's gate: one expert a context, by a gate that is solved for rather than trained."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UserError
from mixtura.methods._drawing import normal_like, router_weight
from mixtura.methods._precision import exact, exact_logits, full_precision
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._clusters import k_means
from mixtura.methods.routers._shared import best, keep
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 2,
    "title": (
        "Towards Foundational Models for Dynamical System Reconstruction: Hierarchical Meta-Learning via "
        "Mixture of Experts"
    ),
    "tags": ["normalized", "token_independent", "lowest_index"],
}


@final
class MixerGate(Router):
    """Send each context to the one expert that a closed-form gate names, with weight 1.

    Tokens are contexts: vectors that stand for environments. The gate is a softmax of an affine map of
    the context and takes no gradient. Every few steps of training `refit` makes it anew: contexts are
    clustered, each cluster gets the expert that does best on it, and the map is solved for by least
    squares. Of equal scores the expert of lowest index is chosen.

    Shapes:
        ``x [T, D]`` to T assignments; the buffers ``weight [E, D]`` and ``bias [E]``.

    Raises:
        SettingError: ``noise`` is not in [0, 1e6], ``num_iterations`` not in [1, 1e6], or ``tolerance``
            not in [0, 1e6].

    Example:
        >>> router = MixerGate(LayerShape(d_model=2, d_expert=8, num_experts=2))
        >>> contexts = torch.tensor([[1.0, 0.0], [1.1, 0.0], [-1.0, 0.0], [-1.1, 0.0]])
        >>> losses = torch.tensor([[5.0, 1.0], [5.0, 1.0], [1.0, 5.0], [1.0, 5.0]])
        >>> router.refit(contexts, losses, torch.Generator().manual_seed(0))
        True
        >>> router(RouterInput.of(contexts)).expert_ids.tolist()
        [0, 0, 1, 1]

    Differences from the paper:
        Training the contexts themselves and the experts in turns is the caller's. That the gate is left
        as it is where clustering fails is as in the authors' code, which starts the centres near zero and
        goes on from those of the time before; here they start at contexts drawn anew, which fails less often
        but more often settles on a clustering that is not the best.

    Reference:
        Towards Foundational Models for Dynamical System Reconstruction: Hierarchical Meta-Learning via
        Mixture of Experts (paper 2, abstract); the authors' code, ddrous/MixER, as summarised.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        shape: LayerShape,
        *,
        noise: float = 1e-4,
        num_iterations: int = 20,
        tolerance: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.noise = self.within("noise", noise, 0, 1e6)
        self.num_iterations = self.within("num_iterations", num_iterations, 1, 1e6)
        self.tolerance = self.within("tolerance", tolerance, 0, 1e6)
        self.seed = seed
        keep(self, "weight", router_weight(shape, seed))
        keep(self, "bias", torch.zeros(shape.num_experts))

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x.detach(), self.weight) + self.bias
        scores = softmax(logits)
        chosen = best(scores, 1)
        ones = torch.ones_like(chosen, dtype=inputs.x.dtype)
        return Routing.from_choices(chosen, ones, scores=scores, logits=logits, valid=inputs.valid)

    @torch.no_grad()
    @full_precision()
    def refit(
        self, contexts: Float[Tensor, "C D"], losses: Float[Tensor, "C E"], generator: torch.Generator
    ) -> bool:
        """Solve for the gate from each context's loss under each expert; False, and no change, if it fails.

        It fails where a cluster stays empty or clustering does not settle; try again at a later step.

        Raises:
            UserError: there are fewer contexts than experts, or not a loss for each under each expert.
        """
        if contexts.shape[0] < self.shape.num_experts:
            raise UserError(f"MixerGate needs {self.shape.num_experts} contexts, got {contexts.shape[0]}")
        wanted = (contexts.shape[0], self.shape.num_experts)
        if contexts.shape[1] != self.shape.d_model or losses.shape != wanted:
            raise UserError(
                f"MixerGate needs contexts of {self.shape.d_model} features and losses of shape {wanted}, "
                f"got {tuple(contexts.shape)} and {tuple(losses.shape)}; give a loss for every pair"
            )
        clusters = k_means(
            exact(contexts),
            self.shape.num_experts,
            generator,
            num_iterations=self.num_iterations,
            tolerance=self.tolerance,
        )
        if clusters is None:
            return False
        free = losses.new_zeros(self.shape.num_experts)
        target = exact(contexts).new_zeros(losses.shape)
        for cluster in range(self.shape.num_experts):
            expert = int((losses[clusters == cluster].quantile(0.5, dim=0) + free).argmin())
            free[expert] = torch.inf
            target[clusters == cluster, expert] = 1.0
        moved = exact(contexts) + self.noise * normal_like(exact(contexts), generator)
        solved = torch.linalg.pinv(torch.cat([moved, torch.ones_like(moved[:, :1])], dim=1)) @ target
        self.weight.copy_(solved[:-1].T)
        self.bias.copy_(solved[-1])
        return True
