"""Experts of attention, made of dense models' attentions: which tensors, and do actions make each once?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from mixtura.checkpoints.applying.shards import OutputTensor, Unit
from mixtura.checkpoints.dense.view import DenseView
from mixtura.checkpoints.upcycling.units import SumPieces, WriteValues
from mixtura.errors import UserError
from mixtura.methods.upcyclers import ATTENTION_EXPERTS
from mixtura.types.upcycling import ATTENTION_PARTS, Become, CarryAttention, RouteAttention

# By the name of a module of attention the part that it belongs to.
_PART_OF: Mapping[str, str] = {
    "q_proj": "query", "q_norm": "query", "k_proj": "key", "k_norm": "key", "v_proj": "value",
    "o_proj": "output",
}  # fmt: skip
_ATTENTION = ".self_attn."


def is_attention(name: str) -> bool:
    """Whether a tensor of a dense model is of attention."""
    return _ATTENTION in name


def num_attention_experts(become: Become) -> int:
    """How many experts each attention has; 0 where attention is ordinary."""
    choice = become.settings.get("attention")
    if not isinstance(choice, Mapping) or choice.get("name") != ATTENTION_EXPERTS:
        return 0
    return int(choice["num_experts"])


def check_attention(
    become: Become,
    carried: Sequence[CarryAttention],
    routers: Sequence[RouteAttention],
    num_sources: int,
) -> None:
    """Refuse a plan that does not make each part of each expert of attention once.

    Raises:
        UserError: says which.
    """
    number = num_attention_experts(become)
    if not number:
        if carried or routers:
            raise UserError("the plan makes experts of attention, which the model that it names has not")
        return
    for part in ATTENTION_PARTS:
        made = [action.expert for action in carried if part in action.parts]
        if made != [None] and made != list(range(number)):
            raise UserError(
                f"the plan makes the {part} of attention for the experts {made}, and 0 to {number - 1} are "
                "needed, each once, or one for all"
            )
    for action in carried:
        if len(action.sources) != len(action.weights) or not action.sources:
            raise UserError("the action carry_attention of a plan needs a weight for each of its sources")
        if not 0 <= min(action.sources) <= max(action.sources) < num_sources:
            raise UserError(
                f"the plan names the sources {list(action.sources)} of attention, and there are 0 to "
                f"{num_sources - 1}"
            )


def attention_units(
    sources: Sequence[DenseView], carried: Sequence[CarryAttention], name: str, dtype: torch.dtype
) -> Iterator[Unit]:
    """What writes the tensors that a tensor of the dense models' attentions becomes."""
    before, _, own = name.partition(_ATTENTION)
    for action in carried:
        if _PART_OF[own.partition(".")[0]] in action.parts:
            place = "common" if action.expert is None else f"members.{action.expert}"
            pieces = tuple(sources[number].pieces[name] for number in action.sources)
            output = OutputTensor(f"{before}{_ATTENTION}{place}.{own}", dtype, pieces[0].shape)
            yield SumPieces(output, pieces, action.weights)


def router_units(
    routers: Sequence[RouteAttention], num_experts: int, d_model: int, dtype: torch.dtype
) -> Iterator[Unit]:
    """What writes the routers of the experts of attention."""
    for action in routers:
        generator = torch.Generator().manual_seed((action.seed * 1_000_003 + action.layer) % (1 << 63))
        drawn = torch.randn(num_experts, d_model, generator=generator) * action.std
        name = f"model.layers.{action.layer}{_ATTENTION}gate"
        yield WriteValues(OutputTensor(name, dtype, (num_experts, d_model)), drawn)
