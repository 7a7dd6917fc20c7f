"""THOR: experts are drawn at random, and two passes with different experts must agree."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import check_range
from mixtura.methods._precision import exact
from mixtura.methods.routers import Router
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 92,
    "title": "Taming Sparsely Activated Transformer with Stochastic Experts",
    "tags": [
        "normalized",
        "two_passes",
        "reads:training",
        "reads:generator",
        "reads:layer",
        "reads:positions",
        "reads:sequence_ids",
    ],
}


@final
class Thor(Router):
    """Send tokens to experts drawn at random, in training and at inference; nothing is learned here.

    In training one expert is drawn for all tokens of the batch (``training_level="batch"``), one for each
    sequence, or one for each token; at inference one for each token or sequence. The model runs twice on
    the same tokens, and `consistency` pulls both predictions together, so that experts teach each other
    and any of them will do: half the sum of the divergences of each prediction from the other, averaged
    over the tokens whose prediction is trained, times ``consistency_coefficient``. Without a generator
    experts take turns by the token's position. An expert's weight is 1.

    Shapes:
        T assignments; no parameters.

    Raises:
        SettingError: ``consistency_coefficient`` is not in [0, 1e6].
        UserError: neither generator nor positions are given.

    Example:
        >>> router = Thor(LayerShape(d_model=2, d_expert=8, num_experts=4))
        >>> inputs = RouterInput.of(torch.zeros(8, 2), training=True, generator=torch.Generator())
        >>> router(inputs).load.max().item()
        8

    Differences from the paper:
        ``scores`` are the probabilities 1 / E, ``logits`` zeros. Taking turns without a generator is
        ours: no randomness is drawn then. There both passes' losses are added up; here they are averaged,
        as any model's loss is, so that a coefficient of 2.5 is the 5 of the authors' run (1 is their
        program's default, 0.5 here). Predictions are compared where a label counts, as theirs are where
        the target is not padding. With several layers of this router their coefficients are averaged.

    Reference:
        Taming Sparsely Activated Transformer with Stochastic Experts (paper 92, abstract);
        microsoft/Stochastic-Mixture-of-Experts.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        training_level: Literal["batch", "sequence", "token"] = "batch",
        inference_level: Literal["token", "sequence"] = "token",
        consistency_coefficient: float = 2.5,
    ) -> None:
        super().__init__(shape)
        check_range("Thor", "consistency_coefficient", consistency_coefficient, 0, 1e6)
        self.training_level = training_level
        self.inference_level = inference_level
        self.consistency_coefficient = consistency_coefficient

    @property
    def num_chosen(self) -> int:
        return 1

    def forward(self, inputs: RouterInput) -> Routing:
        scores = exact(inputs.x).new_full((inputs.x.shape[0], self.shape.num_experts), 1.0)
        return Routing.from_choices(
            self._drawn(inputs)[:, None],
            inputs.x.new_ones(inputs.x.shape[0], 1),
            scores=scores / self.shape.num_experts,
            logits=torch.zeros_like(scores),
            valid=inputs.valid,
        )

    def consistency(self, first: Tensor, second: Tensor) -> Tensor:
        """The symmetric divergence of two passes' predictions, from their logits ``[T, V]``."""
        left, right = exact(first).log_softmax(-1), exact(second).log_softmax(-1)
        there = F.kl_div(left, right, reduction="none", log_target=True)
        back = F.kl_div(right, left, reduction="none", log_target=True)
        total = (there + back).sum() / 2 / max(first.shape[0], 1)
        return self.consistency_coefficient * total

    def _drawn(self, inputs: RouterInput) -> Int[Tensor, " T"]:
        """The expert of each token."""
        generator = inputs.generator
        if generator is None:
            turns: Tensor = inputs.need("positions", "Thor") + inputs.layer
            return turns % self.shape.num_experts
        level = self.training_level if inputs.training else self.inference_level
        groups = torch.arange(inputs.x.shape[0], device=inputs.x.device)
        if level != "token":
            groups = inputs.sequences if level == "sequence" else torch.zeros_like(groups)
        count = int(groups.max()) + 1 if groups.numel() else 0
        luck = torch.randint(self.shape.num_experts, (count,), generator=generator, device=generator.device)
        return luck.to(groups.device)[groups]
