"""Dense mixing: every expert computes every token, and a softmax weighs them."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact, exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.mixers import Mixer
from mixtura.methods.mixers._shared import shares
from mixtura.types import ExpertsHandle, LayerShape, RouterInput, Routing

METHOD = {
    "paper": None,
    "title": "Softmax mixture of all experts",
    "tags": ["token_independent", "expert_rows"],
}


@final
class Dense(Mixer):
    """Run all experts on every token and add their outputs up, weighted by a softmax of the router.

    The mixture of experts before there were sparse ones: nothing is chosen, the gradient reaches every
    expert from every token, and it costs as much as E experts. A baseline that says what sparsity loses.
    A ``temperature`` below 1 sharpens the weights, above 1 it flattens them.

    Shapes:
        ``x [T, D]`` to ``[T, D]``; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``temperature`` is not in [1e-3, 1e3].

    Example:
        >>> from mixtura.modeling.layer import Experts
        >>> shape = LayerShape(d_model=4, d_expert=8, num_experts=3)
        >>> output, routing = Dense(shape)(RouterInput.of(torch.eye(4)), Experts(shape).matrices)
        >>> output.shape, routing.load.tolist()
        (torch.Size([4, 4]), [4, 4, 4])

    Differences from the paper:
        There is no one paper; this is the gating of the first mixtures of experts, inside a layer.

    Reference:
        The router ``top_k`` with ``top_k`` equal to the number of experts gives the same output.
    """

    def __init__(self, shape: LayerShape, *, temperature: float = 1.0, seed: int = 0) -> None:
        super().__init__(shape)
        check_range("Dense", "temperature", temperature, 1e-3, 1e3)
        self.temperature = temperature
        self.seed = seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput, experts: ExpertsHandle) -> tuple[Float[Tensor, "T D"], Routing]:
        logits = exact_logits(inputs.x, self.weight) / self.temperature
        scores = softmax(logits)
        rows = inputs.valid.nonzero().squeeze(-1)
        output = torch.zeros_like(exact(inputs.x))
        # One expert at a time: all at once would hold E outputs for every token.
        for expert in range(self.shape.num_experts):
            made = experts.run(inputs.x, rows, torch.full_like(rows, expert))
            output = output.index_add(0, rows, scores[rows, expert, None] * made.to(output))
        return output.to(inputs.x.dtype), shares(scores, logits=logits, valid=inputs.valid)
