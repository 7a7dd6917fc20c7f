"""Which tokens of a batch are text, read from whatever form an attention mask has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool
from torch import Tensor

from mixtura.errors import UserError

# Additive masks forbid by numbers far below any bias for distance, from -1e4 to minus infinity.
_FORBIDDEN = -1e3


@final
@dataclass(frozen=True, slots=True)
class Size:
    """Rows and columns of a batch, and how many tokens of each row a cache holds already."""

    rows: int
    columns: int
    past: int


@final
@dataclass(frozen=True, slots=True)
class Padding:
    """What a mask says.

    Attributes:
        known: False for padding, of what is in the cache and of the batch.
        linked: False where a token does not attend to the text before it, so that another sequence begins;
            None where the mask does not tell.
        told: whether there was a mask.
    """

    known: Bool[Tensor, "R C"]
    linked: Bool[Tensor, "R T"] | None = None
    told: bool = True


def padding_of(mask: Any, size: Size, device: torch.device) -> Padding:
    """Read a mask: none, one number a token, queries by keys (bool or additive), or such by type of layer.

    Raises:
        UserError: it is of another form, of which nothing may be guessed.
    """
    if isinstance(mask, Mapping):
        given = [one for one in mask.values() if one is not None]
        # Masks of all layers say the same of padding; those that cannot be read follow one that can.
        tensors = [one for one in given if isinstance(one, Tensor)]
        mask = next(iter(tensors + given), None)
    if mask is None:
        whole = torch.ones(size.rows, size.past + size.columns, dtype=torch.bool, device=device)
        return Padding(whole, told=False)
    if isinstance(mask, Tensor):
        shown = mask if mask.is_floating_point() and mask.ndim > 2 else mask != 0
        fits = mask.ndim in (2, 3, 4) and mask.shape[0] in (1, size.rows)
        if fits and mask.ndim == 2 and mask.shape[1] >= size.columns:
            return Padding(_keys(shown, size).expand(size.rows, -1))
        if fits and mask.ndim > 2 and mask.shape[-2] in (1, size.columns) and mask.shape[-1] >= size.columns:
            allowed = shown if shown.dtype == torch.bool else shown > _FORBIDDEN
            allowed = allowed.any(1) if mask.ndim == 4 else allowed
            return _by_queries(_keys(allowed, size).expand(size.rows, -1, -1), size)
    form = f"a tensor of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise UserError(
        f"which tokens are padding cannot be read from an attention_mask that is {form}; give one number a "
        f"token, of shape {[size.rows, size.past + size.columns]}, or a mask of queries by keys"
    )


def _keys(mask: Bool[Tensor, "*_ C"], size: Size) -> Bool[Tensor, "*_ Q"]:
    """The columns of what is in the cache and of the batch; of a cache of fixed length there are more."""
    total = size.past + size.columns
    return mask[..., :total] if mask.shape[-1] >= total else mask


def _by_queries(allowed: Bool[Tensor, "R T C"], size: Size) -> Padding:
    """A token is text where it attends to itself, unless its row is open only for softmax to have a sum."""
    columns = size.columns
    before, here = allowed[..., :-columns], allowed[..., -columns:]
    if allowed.shape[1] != columns or columns == 1:
        return Padding(torch.cat([before.any(1), here.any(1)], dim=1))
    places = torch.arange(columns, device=allowed.device)
    own = here.diagonal(dim1=1, dim2=2)
    full = here.all(-1)
    opened = full & ~full.all(-1, keepdim=True) & (places < columns - 1)
    others = here & ~torch.eye(columns, dtype=torch.bool, device=allowed.device) & ~opened[..., None]
    alone = ~others.any(1) & ~others.any(2) & ~before.any(-1)
    text = own & ~opened & ~alone
    last = torch.where(text, places, -1).cummax(-1).values
    previous = torch.cat([last.new_full((len(last), 1), -1), last[:, :-1]], dim=1)
    linked = here.gather(-1, previous.clamp(min=0)[..., None]).squeeze(-1) | (previous < 0)
    return Padding(torch.cat([(before & text[..., None]).any(1), text], dim=1), linked)
