"""Router Upcycling: several routers, begun from attention heads, match tokens with experts together."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import UserError
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact, full_precision
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best_weighed
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 111,
    "title": "Router Upcycling: Leveraging Mixture-of-Routers in Mixture-of-Experts Upcycling",
    "tags": ["normalized", "token_independent", "lowest_index"],
}


@final
class RouterUpcycling(Router):
    """Let ``num_routers`` routers match queries of a token with keys of experts, and mean their votes.

    Router r turns the token into a query of ``width`` numbers and has a key for each expert; its vote is
    a softmax over experts of their products over the root of ``width``, as in attention. The mean vote of
    all routers is the score; the ``top_k`` experts of highest score are weighted by their scores over the
    sum of these. Of equal scores the lowest index wins. `start_from_heads` begins the routers from the
    heads of the attention before the layer, when a dense model is upcycled.

    Shapes:
        ``x [T, D]`` to ``T * top_k`` assignments; parameters ``query [R, width, D]`` and
        ``key [R, E, width]``.

    Raises:
        SettingError: ``top_k`` is not in [1, E], ``num_routers`` not in [1, 1e4] or ``width`` not in
            [1, 1e6].

    Example:
        >>> router = RouterUpcycling(LayerShape(d_model=4, d_expert=8, num_experts=3), num_routers=2)
        >>> heads = torch.eye(4).view(2, 2, 4).repeat(1, 8, 1)
        >>> router.start_from_heads(heads, heads)
        >>> bool((router.query == heads).all())
        True

    Differences from the paper:
        What experts are described by when heads' key projections make their keys is not in the abstract:
        here by ``features``, means of the tokens an expert is for, say, or random rows of length root D.
        Votes are averaged as probabilities. Only the abstract and its summary were at hand.

    Reference:
        Router Upcycling: Leveraging Mixture-of-Routers in Mixture-of-Experts Upcycling (paper 111,
        abstract).
    """

    def __init__(
        self, shape: LayerShape, *, top_k: int = 2, num_routers: int = 4, width: int = 16, seed: int = 0
    ) -> None:
        super().__init__(shape)
        self.top_k = self.within("top_k", top_k, 1, shape.num_experts)
        self.num_routers = self.within("num_routers", num_routers, 1, 1e4)
        self.width = self.within("width", width, 1, 1e6)
        self.seed = seed
        self.query = drawn(seed, num_routers, width, shape.d_model)
        self.key = drawn(seed + 1, num_routers, shape.num_experts, width, scale=width)

    @torch.no_grad()
    def start_from_heads(
        self,
        query: Float[Tensor, "H W D"],
        key: Float[Tensor, "G W D"],
        features: Float[Tensor, "E D"] | None = None,
    ) -> None:
        """Begin from the query and key projections of attention heads: the first ``num_routers`` of them.

        ``key`` may have fewer heads than ``query``, each serving a run of those (grouped-query attention).
        An expert's key is the head's projection of its row of ``features``.

        Raises:
            UserError: there are too few heads, they are of another width, or do not go with each other.
        """
        wanted = (self.num_routers, self.width, self.shape.d_model)
        if query.shape[0] < wanted[0] or query.shape[1:] != wanted[1:] or key.shape[1:] != wanted[1:]:
            raise UserError(
                f"RouterUpcycling needs heads of shape {wanted}, got {tuple(query.shape)} and "
                f"{tuple(key.shape)}; choose num_routers and width as the attention has them"
            )
        if key.shape[0] == 0 or query.shape[0] % key.shape[0]:
            raise UserError(f"{key.shape[0]} key heads cannot serve {query.shape[0]} query heads equally")
        if features is None:
            rows = drawn(self.seed + 2, self.shape.num_experts, wanted[2], scale=wanted[2])
            features = rows.detach().to(key)
        size = (self.shape.num_experts, self.shape.d_model)
        if features.shape != size:
            raise UserError(
                f"RouterUpcycling needs features of shape {size}, got {tuple(features.shape)}; "
                "give one row an expert"
            )
        keys = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)[: self.num_routers]
        self.query.copy_(query[: self.num_routers])
        self.key.copy_(torch.einsum("rwd,ed->rew", exact(keys), exact(features).to(exact(keys))))

    def forward(self, inputs: RouterInput) -> Routing:
        scores = self._votes(exact(inputs.x)).softmax(-1).mean(1)
        logits = scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
        chosen, weights = best_weighed(scores, self.top_k)
        return self.chose(inputs, chosen, weights, scores=scores, logits=logits)

    @full_precision()
    def _votes(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T R E"]:
        """What each router gives each expert, before the softmax."""
        queries = torch.einsum("td,rwd->trw", x, self.query.to(x))
        products: Tensor = torch.einsum("trw,rew->tre", queries, self.key.to(x))
        return torch.div(products, self.width**0.5)
