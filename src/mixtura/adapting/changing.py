"""What a change makes of whole matrices: what is merged, and what runs where no kernel knows of adapters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import UserError
from mixtura.kernels.backend import matrix_names
from mixtura.methods._precision import full_precision
from mixtura.types import Change, LowRank, Own, RouterInput


@full_precision()
def low_rank_delta(part: LowRank, dtype: torch.dtype) -> Float[Tensor, "M rows cols"]:
    """What is added to each of the M matrices, in a dtype."""
    scale = part.scale.to(part.a.device, dtype)
    return scale[:, None, None] * (part.b.to(dtype) @ part.a.to(dtype))


def changed_stack(
    stack: Float[Tensor, "E _ _"], part: LowRank | Own, expert_ids: tuple[int, ...], *, transposed: bool
) -> Float[Tensor, "E _ _"]:
    """All experts' matrices, some of them changed, in the dtype they have; differentiable in the change."""
    if not expert_ids:
        return stack
    ids = torch.tensor(expert_ids, device=stack.device)
    if isinstance(part, Own):
        return stack.index_copy(0, ids, part.weight.to(stack.dtype))
    wide = torch.promote_types(stack.dtype, torch.float32)
    delta = low_rank_delta(part, wide)
    changed = stack.index_select(0, ids).to(wide) + (delta.mT if transposed else delta)
    return stack.index_copy(0, ids, changed.to(stack.dtype))


def changed_parameters(module: nn.Module, changes: Sequence[Change]) -> dict[str, Tensor]:
    """The stacked parameters of an experts module as changes leave them, by name.

    Of several with matrices of their own, the last one's stand; what thin factors add comes on top.

    Raises:
        UserError: features are to be dropped out, which a matrix cannot do.
    """
    if any(change.dropout > 0 for change in changes):
        raise UserError(
            "adapters of experts that are built for each pass cannot have dropout; run the experts by "
            "experts_implementation='mixtura', or set the adapter's dropout to 0"
        )
    found: dict[str, Tensor] = {}
    for name, parameter in matrix_names(module).items():
        stack: Tensor = getattr(module, parameter)
        parts = [(one.matrices[name], one.expert_ids) for one in changes if name in one.matrices]
        # A sort that is stable: matrices of adapters' own first.
        for part, expert_ids in sorted(parts, key=lambda one: isinstance(one[0], LowRank)):
            stack = changed_stack(stack, part, expert_ids, transposed=bool(module.is_transposed))
        found[parameter] = stack
    return found


def only_thin(change: Change, experts: Collection[int]) -> Change:
    """Of a change what thin factors add to some of the experts."""
    slots = [slot for slot, expert in enumerate(change.expert_ids) if expert in experts]
    parts = {
        name: LowRank(part.a[slots], part.b[slots], part.scale[slots])
        for name, part in change.matrices.items()
        if isinstance(part, LowRank)
    }
    return replace(change, matrices=parts, expert_ids=tuple(change.expert_ids[slot] for slot in slots))


def changed_weight(weight: Float[Tensor, "rows cols"], change: Change) -> Float[Tensor, "rows cols"]:
    """A linear layer's weight as a change leaves it for every token, in the dtype it has."""
    part = change.matrices["weight"]
    if isinstance(part, Own):
        return part.weight[0].to(weight.dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    kept = weight.to(wide) if change.base_scale is None else weight.to(wide) * change.base_scale.to(wide)
    return (kept + low_rank_delta(part, wide).sum(0)).to(weight.dtype)


def add_to_rows(
    made: Float[Tensor, "*rest rows"],
    x: Float[Tensor, "*rest cols"],
    change: Change,
    bias: Tensor | None,
) -> Float[Tensor, "*rest rows"]:
    """What a linear layer made of its input, with what a change adds for every token.

    Args:
        made: what the base computed.
        x: what it was given.
        change: of its matrix.
        bias: of the base, which ``base_scale`` leaves alone.
    """
    part = change.matrices.get("weight")
    if isinstance(part, Own):
        return F.linear(x, part.weight[0].to(x.dtype), bias)
    if change.base_scale is not None:
        # So that a factor of 1 leaves every bit, with a bias, too.
        made = made + (made if bias is None else made - bias) * (change.base_scale - 1).to(made.dtype)
    if change.extra is not None:
        made = made + change.extra.view(made.shape).to(made.dtype)
    if part is None:
        return made
    seen = F.dropout(x, change.dropout) if change.dropout > 0 else x
    added = low_rank_rows(seen.reshape(-1, part.a.shape[2]), part, change.shares)
    return made + added.view(*x.shape[:-1], -1).to(made.dtype)


def low_rank_rows(
    x: Float[Tensor, "T cols"], part: LowRank, shares: Float[Tensor, "T M"] | None
) -> Float[Tensor, "T rows"]:
    """What M additions make of tokens, of which each gets its shares; all of every one without any."""
    count, rank, cols = part.a.shape
    thin = F.linear(x.to(part.a.dtype), part.a.reshape(count * rank, cols)).view(len(x), count, rank)
    thin = thin * part.scale.to(thin)[:, None]
    if shares is not None:
        thin = thin * shares.to(thin)[:, :, None]
    wide = part.b.permute(1, 0, 2).reshape(part.b.shape[1], count * rank)
    return F.linear(thin.reshape(len(x), count * rank).to(wide.dtype), wide)


def nothing(dtype: torch.dtype, device: torch.device, width: int) -> RouterInput:
    """The input of an adapter that makes the same of every token: no token."""
    return RouterInput.of(torch.empty(0, width, dtype=dtype, device=device))
