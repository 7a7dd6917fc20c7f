"""Deciding which tokens go to which experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtura.errors import UserError
from mixtura.methods.settings import Ranged
from mixtura.types import LayerShape, RouterInput, Routing

KIND = {
    "base": "Router",
    "summary": "Sends each token to experts.",
    "tags": {
        "reads:FIELD": "looks at this optional field of `RouterInput`",
        "may_read:FIELD": "looks at this field where it is given, and is as published without it",
        "normalized": "a token's weights sum to 1",
        "token_independent": "a token's experts depend on that token alone",
        "looks_ahead": "in training, a token's experts may depend on later tokens",
        "causal_inference": "looks ahead in training, but not where `training` is false and `causal` true",
        "batch_dependent": "a sequence's experts may depend on the other sequences of the batch",
        "lowest_index": "of equal scores the expert of lowest index is chosen",
        "shared": "one instance serves all MoE layers of a model",
        "stateful": "each layer's router goes on from the `state` of the one before",
        "two_passes": "trained on two passes over the same tokens, whose outputs `consistency` compares",
        "compiles": "gives the same routing under `torch.compile`",
        "expert_rows": "scores experts by a token's products with the rows of its parameter `weight` [E, D]",
        "axes": "experts lie on a grid, and scores are those of its rows and its columns",
        "gates": "gives weights to rows and columns of a grid instead of sending tokens to experts",
        "modulates": "multiplies the features of tokens before experts read them, by `Routing.modulation`",
        "keeps_weights": "its parameter `weight` may hold the rows [E, D] of a trained top-k router",
    },
}


class Router(nn.Module, Ranged, ABC):
    """Decides which tokens go to which experts, and with what weight.

    Routing keeps nothing on the module: losses, the state for the next layer and the history for later
    tokens are returned in the `Routing`. Parameters are drawn from the method's own ``seed``. What a
    method promises and needs is said by the tags of its file.

    Attributes:
        choice_settings: the settings, if there are any, that say how many experts a token has.
    """

    choice_settings: ClassVar[tuple[str, ...]] = ("top_k",)

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.shape = shape

    def __call__(self, inputs: RouterInput) -> Routing:
        """The routing of T tokens; see `forward`.

        Raises:
            UserError: the input is of a layer of other sizes, or lacks what the method cannot do without.
        """
        inputs.require_fit(self.shape, type(self).__name__)
        routed: Routing = super().__call__(inputs)
        return routed

    @abstractmethod
    def forward(self, inputs: RouterInput) -> Routing:
        """The routing of T tokens. Tokens that are not valid get no expert.

        Noise comes from ``inputs.generator`` alone; without one there is none.

        Raises:
            UserError: a field of the input that the method cannot do without is not there.
        """

    @property
    def axes(self) -> tuple[LayerShape, ...]:
        """What its balancers see as experts: all, or where they lie on a grid the rows, then the columns."""
        return (self.shape,)

    @property
    def num_chosen(self) -> int | None:
        """To how many experts a token goes; None where a method does not say."""
        found = getattr(self, "top_k", None)
        return found if isinstance(found, int) else None

    @classmethod
    def settings_for(cls, top_k: int, shape: LayerShape, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings, besides those given, by which a token has ``top_k`` experts, exactly or on average."""
        del shape, given
        return dict.fromkeys(cls.choice_settings, top_k)

    def require_pool(self, num_layers: int) -> None:
        """Raise unless the method suits a layer that reaches the experts of so many layers.

        Raises:
            UserError: it is set for another number.
        """
        del num_layers

    def consistency(self, first: Tensor, second: Tensor) -> Tensor:
        """What to add to the training loss for the model's logits ``[T, V]`` of two passes.

        Only routers tagged ``two_passes`` have something to add.
        """
        del second
        return first.new_zeros(())

    def handed(self, inputs: RouterInput, width: int, what: str = "logits") -> Tensor | None:
        """The state, ``width`` of ``what`` a token, that the router of the layer before handed on, if any.

        Raises:
            UserError: it is of another width.
        """
        state = inputs.state
        if state is not None and state.shape[1:] != (width,):
            raise UserError(
                f"{type(self).__name__} needs a state of {width} {what} a token, got {tuple(state.shape)}; "
                "give all MoE layers the same router and as many experts"
            )
        return state

    def chose(
        self,
        inputs: RouterInput,
        chosen: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K"],
        **parts: Any,
    ) -> Routing:
        """The routing in which every token chose K experts, its weights in the tokens' dtype.

        An id of E or more is an absent choice. ``parts`` are those of `Routing.from_choices`.
        """
        return Routing.from_choices(chosen, weights.to(inputs.x.dtype), valid=inputs.valid, **parts)
