"""Mixture of depths: only a sequence's most important tokens pass through the layer, the others skip it."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import check_range
from mixtura.methods._drawing import drawn, router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import mean_of_valid, softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best, rank_in_sequence
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": None,
    "title": "Mixture-of-Depths: Dynamically allocating compute in transformer-based language models",
    "tags": [
        "looks_ahead",
        "causal_inference",
        "lowest_index",
        "reads:sequence_ids",
        "reads:training",
        "reads:causal",
    ],
}

# The predictor is to be as small as a router, also where models are wide.
_MOST_HIDDEN = 64


@final
class MixtureOfDepths(Router):
    """Let the ``capacity`` share of a sequence's tokens that score highest use experts; the rest skip them.

    A vector scores each token; the best tokens of each sequence (their share rounded up, of equal scores the
    earlier) go to their ``num_choices`` most probable experts, of equal ones the lowest index. The weight
    is probability times score, so the score is trained. With one expert it is a skip of the layer.

    Ranking needs the whole sequence. At inference in a decoder a token is therefore judged alone, by what
    the loss ``depth``, a binary cross entropy with the choices in training, has taught: a small network on
    the token without gradient to it (``rule="predictor"``), or the score itself (``"score"``), positive for
    tokens to take.

    Shapes:
        ``x [T, D]`` to about ``capacity * T * num_choices`` assignments; parameters ``weight [E, D]``,
        ``depth [1, D]`` and, with the predictor, ``hidden [H, D]`` and ``predicted [1, H]``, where H is D / 4
        but at most 64.

    Raises:
        SettingError: ``num_choices`` is not in [1, E], ``capacity`` not in [0, 1], or ``coefficient`` not
            in [0, 1e6].

    Example:
        >>> router = MixtureOfDepths(LayerShape(d_model=4, d_expert=8, num_experts=2), capacity=0.25)
        >>> router(RouterInput.of(torch.eye(8, 4), training=True)).load.sum().item()
        2

    Differences from the paper:
        There whole blocks, attention included, are skipped, and there is one path to take; here it is the
        experts of a layer, chosen by a softmax of their own. The paper finds a ``capacity`` of 0.125 in every
        other block best; half of the tokens, the default here, suits MoE layers that follow each other.

    Reference:
        Mixture-of-Depths: Dynamically allocating compute in transformer-based language models.
    """

    choice_settings = ("num_choices",)

    def __init__(
        self,
        shape: LayerShape,
        *,
        num_choices: int = 1,
        capacity: float = 0.5,
        rule: Literal["predictor", "score"] = "predictor",
        coefficient: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_range("MixtureOfDepths", "num_choices", num_choices, 1, shape.num_experts)
        check_range("MixtureOfDepths", "capacity", capacity, 0, 1)
        check_range("MixtureOfDepths", "coefficient", coefficient, 0, 1e6)
        self.num_choices, self.capacity, self.rule = num_choices, capacity, rule
        self.coefficient, self.seed = coefficient, seed
        self.weight = router_weight(shape, seed)
        self.depth = drawn(seed + 1, 1, shape.d_model)
        if rule == "predictor":
            width = max(min(shape.d_model // 4, _MOST_HIDDEN), 1)
            self.hidden = drawn(seed + 2, width, shape.d_model)
            self.predicted = drawn(seed + 3, 1, width)

    def forward(self, inputs: RouterInput) -> Routing:
        logits = exact_logits(inputs.x, self.weight)
        scores = softmax(logits)
        depth = exact_logits(inputs.x, self.depth)
        guess = depth[:, 0] if self.rule == "score" else self._guess(inputs.x.detach())
        taken = self._ranked(depth, inputs) if inputs.may_look_ahead else guess > 0
        each = F.binary_cross_entropy_with_logits(guess, taken.to(guess), reduction="none")
        chosen = best(scores, self.num_choices)
        return self.chose(
            inputs,
            chosen.masked_fill(~taken[:, None], self.shape.num_experts),
            (scores.gather(-1, chosen) * depth),
            scores=scores,
            logits=logits,
            losses={"depth": self.coefficient * mean_of_valid(each, inputs.valid)},
        )

    def _guess(self, x: Float[Tensor, "T D"]) -> Float[Tensor, " T"]:
        return exact_logits(F.silu(exact_logits(x, self.hidden)), self.predicted)[:, 0]

    def _ranked(self, depth: Float[Tensor, "T 1"], inputs: RouterInput) -> Bool[Tensor, " T"]:
        known = torch.cat([inputs.sequences, inputs.sequences.new_zeros(1)])
        sizes = torch.bincount(inputs.sequences[inputs.valid], minlength=int(known.max()) + 1)
        room = torch.ceil(self.capacity * sizes)[inputs.sequences]
        return rank_in_sequence(depth, inputs.valid, inputs.sequences)[:, 0] < room
