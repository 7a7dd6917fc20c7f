"""Making `Routing` records of what a family's own routers returned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import UserError
from mixtura.methods._precision import exact
from mixtura.methods._scores import softmax
from mixtura.rerouting.passes import Pass, Seen
from mixtura.rerouting.seats import Seat
from mixtura.types import Routing


def routings_of(here: Pass, seats: Mapping[int, Seat]) -> dict[int, Routing]:
    """What each layer decided in a pass, by decoder layer number.

    Raises:
        UserError: a layer's rows are not the tokens of the batch, some of which are padding.
    """
    return {index: _routing(here, seats[index], seen) for index, seen in sorted(here.seen.items())}


def _routing(here: Pass, seat: Seat, seen: Seen) -> Routing:
    if seen.routing is not None:
        return seen.routing
    assert seen.logits is not None
    assert seen.expert_ids is not None
    assert seen.weights is not None
    num_experts = seat.layer.num_experts
    logits = exact(seen.logits).reshape(-1, seen.logits.shape[-1])[:, :num_experts]
    known = here.rows(len(logits))
    if known is None and here.valid is not None and not bool(here.valid.all()):
        raise UserError(
            f"layer {seat.layer.index} was given {len(logits)} rows for a batch of {len(here.valid)} tokens "
            "with padding, which cannot be told apart; give batches without padding"
        )
    valid = torch.ones(len(logits), dtype=torch.bool, device=logits.device) if known is None else known.valid
    assert valid is not None
    return Routing.from_choices(
        seen.expert_ids.reshape(len(logits), -1),
        seen.weights.reshape(len(logits), -1),
        scores=_scores(logits, seat.layer.scoring),
        logits=logits,
        valid=valid.to(logits.device),
    )


def _scores(logits: Float[Tensor, "T E"], scoring: str) -> Float[Tensor, "T E"]:
    """What the family compares, before any bias."""
    if scoring == "sigmoid":
        return logits.sigmoid()
    if scoring == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    return softmax(logits)
