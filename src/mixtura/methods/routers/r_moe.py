"""RMoE: a recurrent router that remembers how the layers before routed a token."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.errors import UserError
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact_logits, full_precision
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_weighed
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 23,
    "title": "Layerwise Recurrent Router for Mixture-of-Experts",
    "tags": [
        "normalized",
        "token_independent",
        "lowest_index",
        "shared",
        "stateful",
        "reads:layer",
        "reads:state",
    ],
}


@final
class RMoe(Router):
    """Pass a small state of each token from layer to layer through a GRU, and route by it.

    Each layer projects the token to ``num_dims`` numbers; one recurrent cell, the same for all layers,
    makes the new state of them and the state that the layer before handed on (zeros in the first); each
    layer's own rows make logits of the state. The ``top_k`` most probable experts are chosen, of equal
    ones that of lowest index, and weighted by their softmax probabilities over their sum. ``cell="rnn"``
    is the plain ``tanh`` recurrence. One instance stands in all ``num_layers`` MoE layers of a model.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments, ``state [T, R]`` (R = ``num_dims``). Parameters
        ``project [L, R, D]`` and ``rows [L, E, R]``; the cell's ``input_weight [G*R, R]``,
        ``hidden_weight [G*R, R]``, ``input_bias [G*R]``, ``hidden_bias [G*R]``, G = 3 (1 for ``rnn``).

    Raises:
        SettingError: ``top_k`` is not in [1, E], ``num_layers`` not in [1, 1e4] or ``num_dims`` not in
            [1, 1e5].
        UserError: the layer's number is not below ``num_layers``.

    Example:
        >>> router = RMoe(LayerShape(d_model=4, d_expert=8, num_experts=3), num_layers=2)
        >>> first = router(RouterInput.of(torch.eye(4)))
        >>> again = router(RouterInput.of(torch.eye(4), layer=1, state=first.state))
        >>> first.state.shape, bool((first.state == again.state).any())
        (torch.Size([4, 128]), False)

    Differences from the paper:
        Biases of the cell start from zeros.

    Cost:
        The cell multiplies by two matrices ``[3 * num_dims, num_dims]`` between the token's projection
        and the experts' rows, one after another, and goes back through them in training.

    Reference:
        Layerwise Recurrent Router for Mixture-of-Experts (paper 23); the authors' code, qiuzh20/RMoE.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 2,
        num_layers: int = 8,
        num_dims: int = 128,
        cell: Literal["gru", "rnn"] = "gru",
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.num_layers = self.within("num_layers", num_layers, 1, 1e4)
        self.num_dims = self.within("num_dims", num_dims, 1, 1e5)
        self.cell = cell
        self.seed = seed
        size = 3 * num_dims if cell == "gru" else num_dims
        self.project = drawn(seed, num_layers, num_dims, shape.d_model)
        self.rows = drawn(seed + 1, num_layers, shape.num_experts, num_dims)
        self.input_weight = drawn(seed + 2, size, num_dims)
        self.hidden_weight = drawn(seed + 3, size, num_dims)
        self.input_bias = nn.Parameter(torch.zeros(size))
        self.hidden_bias = nn.Parameter(torch.zeros(size))

    def forward(self, inputs: RouterInput) -> Routing:
        if inputs.layer >= self.num_layers:
            raise UserError(
                f"RMoe is made for {self.num_layers} layers, got layer {inputs.layer}, counted from 0; "
                "give it num_layers=, the number of MoE layers"
            )
        state = self._next_state(
            exact_logits(inputs.x, self.project[inputs.layer]), self.handed(inputs, self.num_dims, "numbers")
        )
        logits = exact_logits(state, self.rows[inputs.layer])
        scores = softmax(logits)
        chosen, weights = best_weighed(scores, self.top_k)
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits, state=state)

    @full_precision()
    def _next_state(self, seen: Float[Tensor, "T R"], state: Tensor | None) -> Float[Tensor, "T R"]:
        before = torch.zeros_like(seen) if state is None else state.to(seen)
        weights = (self.input_weight, self.hidden_weight, self.input_bias, self.hidden_bias)
        step = torch.gru_cell if self.cell == "gru" else torch.rnn_tanh_cell
        return step(seen, before, *(weight.to(seen) for weight in weights))
