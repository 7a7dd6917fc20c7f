"""Keeping the experts of a layer about equally busy."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mixtura.types import BalancerInput, LayerShape

KIND = {
    "base": "Balancer",
    "summary": "Keeps the experts of a layer about equally busy.",
    "tags": {
        "reads:FIELD": "looks at this optional field of `BalancerInput`",
        "whole_batch": "its loss or state needs all tokens of the batch at once, not only their counts",
        "whole_sequences": "its loss needs the tokens of a sequence at once, but not all sequences",
        "global_counts": "goes by the counts of the whole step, as far as they are known in each part of it",
        "by_load": "its loss goes by who gets how many tokens, and is constant where all get all",
        "regularizer": "shapes routing otherwise; does not by itself even out the load",
        "needs_router:NAME": "made for the router NAME, whose scores it understands",
    },
}


class Balancer(ABC):  # noqa: B024 - one of two methods is asked for, below
    """Keeps the experts of a layer about equally busy, by a loss or by a state that is updated.

    A method defines `loss`, `update` or both; what it leaves out does nothing. Both look at one layer,
    whose state is kept by the caller, beside the model's weights. The mean of the losses of a batch's
    parts, each weighted by its valid tokens and given the counts of the whole batch, is the loss of the
    whole, gradient included; a method that cannot promise it says so by the tag ``whole_batch``.

    Entries of the state that are read by others: ``bias [E]`` becomes the router's ``selection_bias``,
    ``allowed [E]`` (bool) the experts it may choose in training, and ``alpha [E, E]`` the ties by which a
    layer of our own weighs experts that meet at a token. An entry that requires a gradient is trained with
    the model, and read in this way. States are kept in float32 at least.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.loss is Balancer.loss and cls.update is Balancer.update:
            raise TypeError(f"{cls.__name__} must define loss or update; it does nothing otherwise")

    def start(self, shape: LayerShape) -> Mapping[str, Tensor]:
        """The state of one layer before the first step; empty for a method that keeps none.

        Raises:
            UserError: the method does not fit a layer of this shape.
        """
        del shape
        return {}

    def loss(self, inputs: BalancerInput) -> Float[Tensor, ""]:
        """What to add to the training loss for this layer."""
        return inputs.routing.scores.new_zeros(())

    def update(self, inputs: BalancerInput) -> Mapping[str, Tensor]:
        """The state of the next step, from that of this one; called once an optimizer step."""
        return inputs.state
