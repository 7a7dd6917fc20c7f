"""Several models of one vocabulary as one: the mean of their logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UserError, check_range
from mixtura.methods.decoders import Branch, Candidate, Decoder, Prompt, View

METHOD = {
    "paper": 187,
    "title": "Growing Transformers: Modular Composition and Layer-wise Expansion on a Frozen Substrate",
    "tags": ["needs:models"],
}


@final
class LogitAveraging(Decoder):
    """Draw from the mean of several models' logits: specialists of one vocabulary, mixed without a router.

    Models are the model and the further ones, in the order given; ``weights`` are shares of the mean, those
    not given 0; none at all are equal ones.

    Shapes:
        Logits [W, V] of W models to [V].

    Raises:
        SettingError: a weight is negative or too large.
        UserError: there are more weights than models, or none is above 0.

    Cost:
        One forward pass of every model a token: all of them are read.

    Example:
        >>> from mixtura.authoring.contracts.decoders import sample_prompt
        >>> [view.model for view in LogitAveraging().open(sample_prompt())[0].views]
        [0, 1]

    Differences from the paper:
        Only its way of decoding; the upcycler `growing_transformers` adds layers. Weights are an addition.

    Reference:
        Growing Transformers: Modular Composition and Layer-wise Expansion on a Frozen Substrate (paper 187).
    """

    neutral: ClassVar[Mapping[str, Any]] = {"weights": [1.0]}

    def __init__(self, *, weights: list[float] = []) -> None:  # noqa: B006 - never changed
        for weight in weights:
            check_range("LogitAveraging", "weights", weight, 0, 1e6)
        self.weights = weights

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        if len(self.weights) > prompt.num_models or (self.weights and not sum(self.weights)):
            raise UserError(
                f"weights of LogitAveraging must be at most one for each of {prompt.num_models} models, and "
                f"one above 0, got {self.weights}"
            )
        return (Branch(views=tuple(View(model=place) for place in range(prompt.num_models))),)

    def mix(self, logits: Float[Tensor, "B W V"], candidates: Sequence[Candidate]) -> Float[Tensor, "B V"]:
        number = logits.shape[1]
        weights = self.weights or [1.0] * number
        shares = torch.tensor(weights + [0.0] * (number - len(weights)), device=logits.device)
        heard = shares > 0
        return torch.einsum("bwv,w->bv", logits[:, heard], shares[heard] / shares.sum())
