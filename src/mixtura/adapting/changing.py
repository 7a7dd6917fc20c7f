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


def changed_weight(weight: Float[Tensor, "rows cols"], *changes: Change) -> Float[Tensor, "rows cols"]:
    """A linear layer's weight as changes leave it for every token, in the dtype it has.

    Of several with a matrix of their own, the last one's stands; factors are of the base alone, and what thin
    factors add comes on top.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    own, kept = _own(changes), weight.to(wide)
    if own is not None:
        kept = own.weight[0].to(weight.dtype).to(wide)
    else:
        for change in changes:
            kept = kept if change.base_scale is None else kept * change.base_scale.to(wide)
    for change in changes:
        part = change.matrices.get("weight")
        if isinstance(part, LowRank):
            kept = kept + low_rank_delta(part, wide).sum(0)
    return kept.to(weight.dtype)


def _own(changes: Sequence[Change]) -> Own | None:
    """The last of the matrices that stand in the place of a linear layer's."""
    parts = [change.matrices.get("weight") for change in changes]
    return next((part for part in reversed(parts) if isinstance(part, Own)), None)


def changes_base(change: Change) -> bool:
    """Whether what a linear layer's base computes is another thing under a change."""
    return change.base_scale is not None or isinstance(change.matrices.get("weight"), Own)


def base_rows(
    made: Float[Tensor, "*rest rows"],
    x: Float[Tensor, "*rest cols"],
    changes: Sequence[Change],
    bias: Tensor | None,
) -> Float[Tensor, "*rest rows"]:
    """What a linear layer's base makes of its input under changes, before anything is added.

    Args:
        made: what it computed.
        x: what it was given.
        changes: of its matrix.
        bias: of the base, which ``base_scale`` leaves alone.
    """
    own = _own(changes)
    if own is not None:
        return F.linear(x, own.weight[0].to(x.dtype), bias)
    for change in changes:
        if change.base_scale is not None:
            # So that a factor of 1 leaves every bit, with a bias, too.
            made = made + (made if bias is None else made - bias) * (change.base_scale - 1).to(made.dtype)
    return made


def added_rows(
    made: Float[Tensor, "*rest rows"], x: Float[Tensor, "*rest cols"], change: Change
) -> Float[Tensor, "*rest rows"]:
    """What a linear layer makes of its input, with what a change adds for every token."""
    if change.extra is not None:
        made = made + change.extra.view(made.shape).to(made.dtype)
    part = change.matrices.get("weight")
    if not isinstance(part, LowRank):
        return made
    seen = F.dropout(x, change.dropout) if change.dropout > 0 else x
    added = low_rank_rows(seen.reshape(-1, part.a.shape[2]), part, change.shares)
    return made + added.view(*x.shape[:-1], -1).to(made.dtype)


def add_to_rows(
    made: Float[Tensor, "*rest rows"],
    x: Float[Tensor, "*rest cols"],
    change: Change,
    bias: Tensor | None,
) -> Float[Tensor, "*rest rows"]:
    """What a linear layer computed of its input, as one change makes it; see `base_rows`."""
    return added_rows(base_rows(made, x, [change], bias), x, change)


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
