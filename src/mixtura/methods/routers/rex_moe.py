"""ReXMoE: experts of neighbouring layers are reused, more of them as training goes on."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Bool
from torch import Tensor

from mixtura.errors import SettingError, UserError, check_range
from mixtura.methods._drawing import router_weight, uniform_like
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax, to_sum_one
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 35,
    "title": "ReXMoE: Reusing Experts with Minimal Overhead in Mixture-of-Experts",
    "tags": [
        "expert_rows",
        "normalized",
        "token_independent",
        "lowest_index",
        "reads:step",
        "reads:training",
        "reads:generator",
    ],
}


@final
class RexMoe(Router):
    """Choose among the experts of ``reuse`` adjacent layers, whose number grows during training.

    The layer's experts are an `ExpertPool` of its own and its neighbours', own ones first; ``reuse`` must be
    the number of layers in it, as models set it by themselves, and is 1 without a pool: plain top-k. The
    ``top_k`` most probable are chosen, weighted by their probabilities over their sum. Up to
    ``start_step`` as many experts are candidates as one layer has, from ``end_step`` on all, in between
    linearly more; outside training all. Which are left out is drawn anew each time, the same for all
    tokens: among the neighbours' (``keep_out="reused"``) or among all (``"any"``); without a generator
    they are the last. Of equally probable experts the one of lowest index is chosen.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; one parameter, ``weight [E, D]``, E of the whole pool.

    Raises:
        SettingError: ``top_k`` is not in [1, E], ``reuse`` does not divide E, or a step is not in
            [0, 1e8] or the end not after the start.

    Example:
        >>> from mixtura.modeling.layer import ExpertPool, Experts
        >>> own, neighbour = (Experts(LayerShape(4, 8, 3), seed=seed) for seed in (0, 1))
        >>> router = RexMoe(ExpertPool([own, neighbour]).shape, top_k=2, reuse=2)
        >>> start = router(RouterInput.of(torch.eye(4), step=0, training=True))
        >>> bool((start.expert_ids < 3).all())
        True

    Differences from the paper:
        Only a summary of the paper was at hand, by which any expert may be left out; here a layer's own
        always stay by default. There are never fewer candidates than ``top_k``.

    Reference:
        ReXMoE: Reusing Experts with Minimal Overhead in Mixture-of-Experts (paper 35, abstract, summary).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        reuse: int = 1,
        start_step: int = 10_000,
        end_step: int = 30_000,
        keep_out: Literal["reused", "any"] = "reused",
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_range("RexMoe", "top_k", top_k, 1, shape.num_experts)
        check_range("RexMoe", "reuse", reuse, 1, shape.num_experts)
        check_range("RexMoe", "start_step", start_step, 0, 1e8)
        check_range("RexMoe", "end_step", end_step, start_step + 1, 1e8)
        if shape.num_experts % reuse:
            raise SettingError(f"reuse of RexMoe must divide the pool's {shape.num_experts}, got {reuse}")
        self.top_k = top_k
        self.reuse = reuse
        self.start_step = start_step
        self.end_step = end_step
        self.keep_out = keep_out
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def require_pool(self, num_layers: int) -> None:
        if num_layers != self.reuse:
            raise UserError(
                f"RexMoe with reuse={self.reuse} is for a pool of {self.reuse} layers' experts, got "
                f"{num_layers}; set reuse to the number of layers whose experts it reaches, 1 without a pool"
            )

    def num_candidates(self, step: int) -> int:
        """How many of the pool's experts may be chosen at a step of training."""
        own = self.shape.num_experts // self.reuse
        done = min(max(step, self.start_step), self.end_step) - self.start_step
        more = (self.reuse - 1) * own * done // (self.end_step - self.start_step)
        return max(own + more, self.top_k)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        usable = logits
        if inputs.training:
            usable = logits.masked_fill(~self._candidates(inputs), -torch.inf)
        chosen = best(usable, self.top_k)
        weights = to_sum_one(softmax(usable).gather(-1, chosen)).to(inputs.x.dtype)
        return Routing.from_choices(
            chosen, weights, scores=softmax(logits), logits=logits, valid=inputs.valid
        )

    def _candidates(self, inputs: RouterInput) -> Bool[Tensor, " E"]:
        """Which experts may be chosen in this pass."""
        order = torch.arange(self.shape.num_experts, device=inputs.x.device) / self.shape.num_experts
        if inputs.generator is not None:
            order = uniform_like(order, inputs.generator)
        if self.keep_out == "reused":
            order[: self.shape.num_experts // self.reuse] -= 1
        return order.argsort().argsort() < self.num_candidates(inputs.step)
