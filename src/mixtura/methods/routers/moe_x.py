"""MoE-X: the experts that will be sparsest, guessed from their own weights."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.methods._precision import exact, exact_logits, full_precision
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._remade import Remade
from mixtura.methods.routers._shared import best
from mixtura.types import ExpertsHandle, LayerShape, RouterInput, Routing

METHOD = {
    "paper": 59,
    "title": "Mixture of Experts Made Intrinsically Interpretable",
    "tags": ["normalized", "token_independent", "lowest_index", "reads:experts"],
}


@final
class MoeX(Router):
    """Send each token to the ``top_k`` experts of which the fewest neurons are expected to fire.

    The first matrix of an expert is summed up by the mean and the variance of its neurons' weights, per
    input dimension. Taken as normal, a neuron's input then has a known mean and spread for a token, and
    a known chance of being positive; the logit ``-erf(mean / (sqrt(2) * spread))`` is high where it is
    small. A softmax over the chosen logits weighs them. Of equal logits the expert of lowest index is
    chosen. Made for experts with ReLU, whose neurons are off below zero.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; no parameters; reads matrices of ``E * F * D`` numbers.

    Raises:
        SettingError: ``top_k`` is not in [1, E].
        UserError: the experts are not given, or are not as many as the router is made for.

    Example:
        >>> from mixtura.modeling.layer import Experts
        >>> shape = LayerShape(d_model=4, d_expert=8, num_experts=3)
        >>> inputs = RouterInput.of(torch.eye(4), experts=Experts(shape).matrices)
        >>> bool((MoeX(shape, top_k=2)(inputs).logits.abs() <= 1).all())
        True

    Differences from the paper:
        Written from a summary, not from the paper's text. Experts are what the layer has: where they are
        gated, the gate matrix is read, since it is what goes through the activation.

    Cost:
        In training the mean and the variance of all ``E * F * D`` weights are computed in every forward
        pass, however few the tokens, and gradients pass through them: many times top-k's time. In
        evaluation without gradients both are kept until weights change; two products in place of one
        remain.

    Reference:
        Mixture of Experts Made Intrinsically Interpretable (paper 59, abstract and summary).
    """

    def __init__(self, shape: LayerShape, *, top_k: int = 2) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self._remade = Remade()

    def forward(self, inputs: RouterInput) -> Routing:
        experts: ExpertsHandle = inputs.need("experts", "MoeX")
        matrices = experts.up if experts.gate is None else experts.gate
        mean, spread = self._remade.of(self, [matrices], lambda: _over_neurons(matrices))
        logits = _expected_sparsity(inputs.x, mean, spread)
        chosen = best(logits, self.top_k)
        weights = softmax(logits.gather(-1, chosen))
        return self.chose(inputs, chosen, weights, scores=softmax(logits), logits=logits)


@full_precision()
def _over_neurons(matrices: Float[Tensor, "E F D"]) -> tuple[Float[Tensor, "E D"], Float[Tensor, "E D"]]:
    """Mean and variance of each expert's weights over its neurons, one expert in the cache at a time."""
    share = exact(matrices.new_full((1, matrices.shape[1]), 1 / matrices.shape[1]))
    means = [share @ exact(matrix) for matrix in matrices]
    spreads = [share @ (exact(matrix) - mean).square() for matrix, mean in zip(matrices, means, strict=True)]
    return torch.cat(means), torch.cat(spreads)


def _expected_sparsity(
    x: Float[Tensor, "T D"], mean: Float[Tensor, "E D"], spread: Float[Tensor, "E D"]
) -> Float[Tensor, "T E"]:
    """-1 where all neurons of an expert are expected to fire, 1 where none is."""
    variance = exact_logits(exact(x).square(), spread)
    # A token of zeros has no spread: its mean of zero must decide.
    deviation = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()
    dense: Tensor = torch.special.erf(exact_logits(x, mean) / (2**0.5 * deviation))
    return -dense
