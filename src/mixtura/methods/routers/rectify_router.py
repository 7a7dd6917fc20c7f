"""Rectify-Router: dropped tokens go to an expert nearby, empty places to tokens that score next."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods._capacity import limit, room
from mixtura.methods._drawing import router_weight
from mixtura.methods._precision import exact_logits
from mixtura.methods._scores import softmax
from mixtura.methods.routers import Router
from mixtura.methods.routers._shared import best, check_parts, dealt
from mixtura.types import LayerShape, RouterInput, Routing

METHOD = {
    "paper": 137,
    "title": "Turn Waste into Worth: Rectifying Top-k Router of MoE",
    "tags": [
        "looks_ahead",
        "causal_inference",
        "batch_dependent",
        "keeps_weights",
        "reads:training",
        "reads:causal",
        "reads:sequence_ids",
    ],
}


@final
class RectifyRouter(Router):
    """Top-k with room for so many tokens an expert, then make good what was dropped or left empty.

    An expert takes ``capacity_factor * top_k * tokens / experts`` tokens (rounded up), earlier ones first.
    ``intra_gpu``: an assignment that finds no room goes to the expert of highest score among those on the
    token's own GPU that the token is not yet at, full or not: the limit is on what GPUs send each other.
    ``fill_in``: places still empty are filled by those valid tokens, not yet there, that score the expert
    highest. Weights are softmax scores; of equal ones the lowest index wins. The first of ``num_gpus`` has
    the first sequences and experts, and so on, and all have as many tokens. Room and empty places are the
    whole batch's, which a decoder does not know at inference: there it is plain top-k.

    Shapes:
        ``x [T, D]`` to about ``T * top_k`` assignments; one parameter, ``weight [E, D]``.

    Raises:
        SettingError: ``num_gpus`` does not divide E, ``top_k`` is above E, or the factor not in [0, 1e6].

    Example:
        >>> router = RectifyRouter(LayerShape(d_model=4, d_expert=8, num_experts=4), fill_in=False)
        >>> same = RouterInput.of(torch.ones(8, 4), training=True, sequence_ids=torch.arange(8) // 4)
        >>> router(same).load.tolist(), router(same).demand.tolist()
        ([0, 2, 0, 6], [0, 0, 0, 8])

    Differences from the paper:
        Sequences are dealt out to imagined GPUs. With ``top_k`` above 1 an expert the token is at already
        is passed over. What a decoder does at inference is ours. Only the abstract was at hand.

    Cost:
        With a single token a call what counts is the number of operations: places are counted and filled
        in steps that top-k does not have. With many, sorting all tokens for every expert to fill what is
        empty.

    Reference:
        Turn Waste into Worth: Rectifying Top-k Router of MoE (paper 137, abstract).
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        top_k: int = 1,
        capacity_factor: float = 1.0,
        intra_gpu: bool = True,
        fill_in: bool = True,
        num_gpus: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        check_range("RectifyRouter", "top_k", top_k, 1, shape.num_experts)
        check_range("RectifyRouter", "capacity_factor", capacity_factor, 0, 1e6)
        check_parts("RectifyRouter", "num_gpus", num_gpus, shape.num_experts)
        self.top_k, self.capacity_factor = top_k, capacity_factor
        self.intra_gpu, self.fill_in = intra_gpu, fill_in
        self.num_gpus, self.seed = num_gpus, seed
        self.weight = router_weight(shape, seed)

    def forward(self, inputs: RouterInput) -> Routing:
        logits, valid = exact_logits(inputs.x, self.weight), inputs.valid
        scores = softmax(logits)
        chosen = best(scores, self.top_k)
        plain = Routing.from_choices(
            chosen, scores.gather(-1, chosen).to(inputs.x.dtype), scores=scores, logits=logits, valid=valid
        )
        if not inputs.may_look_ahead:
            return plain
        capacity = room(valid, self.shape.num_experts, self.capacity_factor, self.top_k)
        kept = limit(plain, capacity)
        wanted, placed = _table(plain), _table(kept)
        dropped = wanted.sum(-1, keepdim=True) - placed.sum(-1, keepdim=True)
        if self.fill_in:
            open_scores = scores.masked_fill(wanted | ~valid[:, None], -torch.inf)
            placed = placed | _highest(open_scores, capacity - kept.load, dim=0)
        if self.intra_gpu:
            experts = torch.arange(self.shape.num_experts, device=valid.device)
            here = dealt(inputs.sequences, valid, self.num_gpus)[:, None]
            near = dealt(experts, torch.ones_like(experts, dtype=torch.bool), self.num_gpus) == here
            placed = placed | _highest(scores.masked_fill(placed | ~near, -torch.inf), dropped, dim=1)
        rows, columns = placed.nonzero(as_tuple=True)
        weights = scores[rows, columns].to(inputs.x.dtype)
        made = Routing.from_assignments(rows, columns, weights, scores=scores, logits=logits, valid=valid)
        return replace(made, demand=plain.load)


def _table(routing: Routing) -> Bool[Tensor, "T E"]:
    """Which token goes to which expert."""
    table = torch.zeros_like(routing.scores, dtype=torch.bool)
    table[routing.token_ids, routing.expert_ids] = True
    return table


def _highest(scores: Float[Tensor, "T E"], counts: Int[Tensor, "..."], dim: int) -> Bool[Tensor, "T E"]:
    """The so many highest of each column (``dim`` 0) or row, none that is minus infinity."""
    order = scores.detach().sort(dim=dim, descending=True, stable=True).indices
    places = torch.empty_like(order).scatter(dim, order, torch.ones_like(order).cumsum(dim))
    return (places <= counts) & (scores > -torch.inf)
