"""LocMoE: orthogonal rows on pooled features, and a loss that keeps tokens on their own node."""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import SettingError, check_range
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._remade import Remade
from mixtura.methods.routers._shared import best, check_parts, dealt
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 99,
    "title": "LocMoE: A Low-overhead MoE for Large Language Model Training",
    "tags": ["token_independent", "lowest_index", "reads:sequence_ids"],
}


@final
class LocMoe(Router):
    """Route by orthogonal rows on averages of the token's features, with a loss for staying on the node.

    Neighbouring features are averaged into ``pooled_width`` groups (default: E). The experts' rows on
    these are kept orthonormal, so that experts stay apart: the orthonormal factor of ``weight``. The
    ``top_k`` experts of highest softmax probability are taken, weighted by it; of equal ones the lowest
    index wins. Tokens, by sequence, and experts are spread over ``num_nodes`` in equal runs. The loss
    ``locality`` is the divergence of each node's mean probabilities from a target that gives its own
    experts ``local_share``, averaged over nodes by their tokens.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; one parameter, ``weight [E, pooled_width]``.

    Raises:
        SettingError: ``pooled_width`` is not in [E, D], ``num_nodes`` does not divide E, and so on.

    Example:
        >>> router = LocMoe(LayerShape(d_model=8, d_expert=8, num_experts=2), pooled_width=4)
        >>> rows = router.rows()
        >>> torch.allclose(rows @ rows.T, torch.eye(2), atol=1e-6)
        True

    Differences from the paper:
        Sequences are dealt out to imagined nodes; where they are too few or of unequal length, one is cut, so
        that all nodes have as many tokens. The lowest capacity is derived by us from the angle that
        the abstract names, and not applied. Only the abstract and its summary were at hand.

    Cost:
        Many tokens take less time than top-k's, for pooled features are fewer. With a single token a call
        what counts is the number of operations, many of which are the loss for each node. In training
        rows are made orthonormal in every forward pass.

    Reference:
        LocMoE: A Low-overhead MoE for Large Language Model Training (paper 99, abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 1,
        pooled_width: int | None = None,
        temperature: float = 0.3,
        num_nodes: int = 2,
        local_share: float = 0.9,
        coefficient: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        width = shape.num_experts if pooled_width is None else pooled_width
        if shape.num_experts > shape.d_model:
            raise SettingError(
                f"LocMoe has rows at right angles, at most {shape.d_model} for tokens of {shape.d_model} "
                f"features, got {shape.num_experts} experts; choose fewer experts or another router"
            )
        check_range("LocMoe", "top_k", top_k, 1, shape.num_experts)
        check_range("LocMoe", "pooled_width", width, shape.num_experts, shape.d_model)
        check_range("LocMoe", "temperature", temperature, 1e-3, 1e3)
        check_parts("LocMoe", "num_nodes", num_nodes, shape.num_experts)
        check_range("LocMoe", "local_share", local_share, 1e-3, 0.999)
        check_range("LocMoe", "coefficient", coefficient, 0, 1e6)
        self.top_k, self.pooled_width, self.temperature = top_k, pooled_width, temperature
        self.num_nodes, self.local_share = num_nodes, local_share
        self.coefficient, self.seed = coefficient, seed
        self.weight = drawn(seed, shape.num_experts, width)
        self._remade = Remade()

    def rows(self) -> Float[Tensor, "E P"]:
        """The experts' rows: orthonormal, as near to ``weight`` as the order of experts allows."""
        factor, triangle = torch.linalg.qr(exact(self.weight).T)
        return torch.mul(factor, triangle.diagonal().sign()).T

    def lowest_capacity(self, x: Float[Tensor, "T D"]) -> float:
        """The least room an expert needs, in tokens: ``exp(P c^2 / (2 - c^2)) / E``, P the pooled width.

        c is the smallest cosine of a token and the row of its expert. Of random directions at most the
        inverse of that exponential lie as near to a row: with less room it may not see even one.
        """
        cosines = exact_logits(F.normalize(self._pooled(x), dim=-1), self.rows()).amax(-1).tolist()
        square = max(min(cosines, default=0.0), 0.0) ** 2
        return math.exp(self.weight.shape[1] * square / (2 - square)) / self.shape.num_experts

    def forward(self, inputs: RouterInput) -> Routing:
        (rows,) = self._remade.of(self, [self.weight], lambda: (self.rows(),))
        logits = exact_logits(self._pooled(inputs.x), rows) / self.temperature
        scores = softmax(logits)
        chosen = best(scores, self.top_k)
        weights = scores.gather(-1, chosen).to(inputs.x.dtype)
        losses = {"locality": self.coefficient * self._locality(scores, inputs)}
        return Routing.from_choices(
            chosen, weights, scores=scores, logits=logits, valid=inputs.valid, losses=losses
        )

    def _pooled(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T P"]:
        """Means of neighbouring features."""
        return F.adaptive_avg_pool1d(exact(x)[:, None], self.weight.shape[1])[:, 0]

    def _locality(self, scores: Float[Tensor, "T E"], inputs: RouterInput) -> Tensor:
        """The divergence of each node's mean probabilities from staying at home, by its tokens."""
        valid, total = inputs.valid, scores.new_zeros(())
        size = self.shape.num_experts // self.num_nodes
        at = dealt(inputs.sequences, valid, self.num_nodes)
        for node in range(self.num_nodes if self.num_nodes > 1 else 0):
            here = valid & (at == node)
            target = torch.full_like(scores[:1], (1 - self.local_share) / (self.shape.num_experts - size))
            target[:, node * size : (node + 1) * size] = self.local_share / size
            means = scores[here].sum(0) / here.sum().clamp(min=1)
            total = total + here.sum() * (means * (means.clamp(min=1e-30) / target).log()).sum()
        return total / valid.sum().clamp(min=1)
