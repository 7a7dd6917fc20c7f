"""The Switch Transformer's router: one expert a token, with room for so many tokens."""

from __future__ import annotations

from typing import final

from mixtura.methods._capacity import limit, room
from mixtura.methods._drawing import router_weight, uniform_like
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 132,
    "title": "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
    "tags": [
        "looks_ahead",
        "causal_inference",
        "batch_dependent",
        "lowest_index",
        "keeps_weights",
        "reads:training",
        "reads:causal",
        "reads:generator",
    ],
}


@final
class Switch(Router):
    """Send each token to its one most probable expert, unless that expert is full.

    An expert has room for ``capacity_factor * tokens / experts`` tokens (rounded up), earlier tokens
    first; a token without room gets no expert and passes by the layer. How many tokens there will be is
    not known at inference in a decoder, where there is no limit. The expert's output is
    multiplied by its probability. In training the router's input is multiplied by noise drawn from
    [1 - jitter, 1 + jitter]. The router computes in float32 whatever the model's dtype.

    Shapes:
        ``x [T, D]`` to at most T assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``capacity_factor`` is not in [0, 1e6], or ``jitter`` not in [0, 1].

    Example:
        >>> import torch
        >>> shape = LayerShape(d_model=4, d_expert=8, num_experts=2)
        >>> same = torch.ones(6, 4)
        >>> Switch(shape, capacity_factor=1.0)(RouterInput.of(same, training=True)).load.tolist()
        [3, 0]

    Differences from the paper:
        The limit counts valid tokens, so padding neither takes nor makes room. Without a generator
        there is no jitter. Rows are drawn from a plain, not a truncated, normal distribution of
        variance 0.1 / D. One factor holds in training and, in encoders, at inference, where the paper
        gives more room; that decoders have no limit at inference is ours.

    Reference:
        Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity
        (paper 132); ``SwitchTransformersTop1Router`` in transformers 5.23.
    """

    def __init__(
        self, shape: LayerShape, *, capacity_factor: float = 1.25, jitter: float = 0.01, seed: int = 0
    ) -> None:
        super().__init__(shape)
        self.capacity_factor = self.within("capacity_factor", capacity_factor, 0, 1e6)
        self.jitter = self.within("jitter", jitter, 0, 1)
        self.seed = seed
        self.weight = router_weight(shape, seed, scale=0.1)

    @property
    def num_chosen(self) -> int:
        return 1

    def forward(self, inputs: RouterInput) -> Routing:
        x = exact(inputs.x)
        if inputs.training and self.jitter and inputs.generator is not None:
            x = x * (1 + self.jitter * (2 * uniform_like(x, inputs.generator) - 1))
        logits = exact_logits(x, self.weight)
        scores = softmax(logits)
        chosen = best(scores, 1)
        routing = self.chose(inputs, chosen, scores.gather(-1, chosen), scores=scores, logits=logits)
        if not inputs.may_look_ahead:
            return routing
        return limit(routing, room(inputs.valid, self.shape.num_experts, self.capacity_factor))
