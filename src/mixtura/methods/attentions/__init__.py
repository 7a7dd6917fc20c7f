"""What tokens gather from earlier tokens of their sequence."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from mixtura.errors import SettingError
from mixtura.methods.settings import Ranged
from mixtura.types import Routing
from mixtura.types.attending import AttentionInput, AttentionShape

Attended = tuple[Float[Tensor, "B Q D"], Float[Tensor, "B H Q C"] | None, Routing | None]

KIND = {
    "base": "Attention",
    "summary": "Gathers from earlier tokens, in all heads or in some that a token or head chose.",
    "tags": {
        "gives_weights": "returns who attends to whom where the model's implementation does, for routers "
        "that read it",
        "routes": "chooses heads for tokens or tokens for heads, and returns the routing of tokens to heads",
        "looks_ahead": "in training, which heads a token is in may depend on later tokens",
        "causal_inference": "looks ahead in training, but not where `training` is false",
        "reads:history": "remembers what it returned for the earlier tokens of a row",
    },
}


class Attention(nn.Module, Ranged, ABC):
    """What a layer's tokens gather from the tokens before them.

    Nothing is kept on the module: the routing of tokens to heads, and in its history what later tokens need,
    are returned. Projections that are ``nn.Linear`` are drawn by the model, in order; other parameters from
    the method's own ``seed``. The core gives a method, of what it has a setting for and the user left open,
    the model's ``seed``, ``bias``, ``query_key_norm`` and ``eps``.

    Attributes:
        layer_idx: the decoder layer, by which the cache finds keys and values; set by the core.
        is_causal: whether tokens see earlier tokens alone, for the implementations of transformers.
        num_key_value_groups: heads of queries that share one of keys and values in ``attend``.
        scaling: by which ``attend`` multiplies products of queries and keys.
        window: how many places, its own among them, a token sees in ``attend``; None for all before it.
    """

    is_causal = True
    window: int | None = None

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.shape = shape
        self.layer_idx = 0
        self.num_key_value_groups = shape.num_groups
        self.scaling: float = shape.d_head**-0.5

    @abstractmethod
    def forward(self, inputs: AttentionInput) -> Attended:
        """What each token gathers ``[B, Q, D]``; the weights where there are any; the routing to heads.

        The routing, of T = B * Q tokens to H heads as its experts, is that of methods tagged ``routes``.
        What padding gathers does not matter, as long as it is finite.
        """

    def rescale(self, deviation: float) -> None:
        """Give matrices that the model does not draw a common ``deviation``."""
        del deviation

    def by_head(self, query_key_norm: str) -> bool:
        """Whether queries and keys are normed within each head, where heads have tokens of their own.

        Raises:
            SettingError: they are to be normed over all heads at once.
        """
        if query_key_norm == "full":
            raise SettingError(
                f"{type(self).__name__} has tokens of its own in each head, so queries and keys cannot be "
                "normed over all heads; set query_key_norm to head or none"
            )
        return query_key_norm == "head"
