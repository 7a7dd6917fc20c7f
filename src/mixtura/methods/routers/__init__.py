"""Deciding which tokens go to which experts."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from mixtura.types import LayerShape, RouterInput, Routing

KIND = {
    "base": "Router",
    "summary": "Sends each token to experts.",
    "tags": {
        "reads:FIELD": "looks at this optional field of `RouterInput`",
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
        "keeps_weights": "its parameter `weight` may hold the rows [E, D] of a trained top-k router",
    },
}


class Router(nn.Module, ABC):
    """Decides which tokens go to which experts, and with what weight.

    Routing keeps nothing on the module: losses, the state for the next layer and the history for later
    tokens are returned in the `Routing`. Parameters are drawn from the method's own ``seed``. What a
    method promises and needs is said by the tags of its file.
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def forward(self, inputs: RouterInput) -> Routing:
        """The routing of T tokens. Tokens that are not valid get no expert.

        Noise comes from ``inputs.generator`` alone; without one there is none.

        Raises:
            UserError: a field of the input that the method cannot do without is not there.
        """

    def consistency(self, first: Tensor, second: Tensor) -> Tensor:
        """What to add to the training loss for the model's logits ``[T, V]`` of two passes.

        Only routers tagged ``two_passes`` have something to add.
        """
        del second
        return first.new_zeros(())
