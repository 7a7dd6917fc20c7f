"""Leaving out experts that a family's own router has chosen, and weighting the others otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mixtura.errors import UnsupportedModelError
from mixtura.machine.releases import in_order_of, logits_weights_choices
from mixtura.types.steering import Steering

_PROBED_ROWS = 16
# Weights that a family divides by their sum have the same sum to about the precision of 16-bit numbers.
_EQUAL = 0.02


def thinned(
    output: Any, steering: Steering, num_experts: int, *, normalizes: bool, absent: bool
) -> tuple[tuple[Any, ...], Int[Tensor, " T"] | None]:
    """What a router returned, as ``ranks``, ``least`` and ``scale`` change it; experts left of each token.

    Left-out experts have weight 0 and, with ``absent``, the number E, which nothing runs.

    Raises:
        UnsupportedModelError: the router returns logits alone in the installed transformers.
    """
    logits, weights, ids = logits_weights_choices(output)
    made = weights.reshape(-1, weights.shape[-1])
    chosen = ids.reshape(made.shape)
    keep = torch.ones_like(chosen, dtype=torch.bool)
    if steering.ranks is not None:
        keep = _within(steering.ranks, chosen)
        made = _without(made, keep, normalizes=normalizes)
    if steering.least is not None:
        share = made / made.sum(-1, keepdim=True).clamp_min(torch.finfo(made.dtype).tiny)
        keep = keep & (share >= steering.least.to(share)[..., None])
        made = made.masked_fill(~keep, 0.0)
    if steering.scale is not None:
        places = chosen.clamp(max=num_experts - 1)
        scale = steering.scale.to(made).expand(len(made), -1)
        made = made * scale.gather(-1, places)
    left = None
    if steering.ranks is not None or steering.least is not None:
        left = keep.sum(-1)
        chosen = chosen.masked_fill(~keep, num_experts) if absent else chosen
    shown = made.to(weights.dtype).view(weights.shape), chosen.view(ids.shape)
    return in_order_of(output, logits, *shown), left  # type: ignore[arg-type]


def require_ranks(output: Any, steering: Steering, top_k: int, num_experts: int) -> None:
    """Refuse a family whose router makes something else of more choices a token than its own number.

    Raises:
        UnsupportedModelError: it does.
    """
    if steering.ranks is None:
        return
    logits, weights, _ = logits_weights_choices(output)
    most = min(max(top_k, int(steering.ranks[..., 1].max())), num_experts)
    rows = None if logits is None else logits.numel() // logits.shape[-1]
    if weights.shape[-1] != most or (rows is not None and weights.numel() != rows * most):
        raise UnsupportedModelError(
            f"the routers of this family cannot give a token {most} experts, their own number is {top_k}; "
            "choose another decoder or fewer experts"
        )


def _within(ranks: Int[Tensor, "*T 2"], chosen: Int[Tensor, "T K"]) -> Bool[Tensor, "T K"]:
    places = torch.arange(chosen.shape[-1], device=chosen.device)
    kept = (places >= ranks[..., :1]) & (places < ranks[..., 1:])
    return kept.expand(chosen.shape)


def _without(
    weights: Float[Tensor, "T K"], keep: Bool[Tensor, "T K"], *, normalizes: bool
) -> Float[Tensor, "T K"]:
    left = weights.masked_fill(~keep, 0.0)
    if not normalizes:
        return left
    whole, rest = weights.sum(-1, keepdim=True), left.sum(-1, keepdim=True)
    grown = left * (whole / rest.clamp_min(torch.finfo(weights.dtype).tiny))
    # Where nothing is left out, not even rounding changes.
    return torch.where(keep.all(-1, keepdim=True), weights, grown)


@torch.no_grad()
def normalizes(gate: Any, run: Callable[[Tensor], Any], width: int, dtype: torch.dtype) -> bool:
    """Whether a family divides a token's weights by their sum: its router says so, or is tried on some rows.

    Routers whose setting is not known by name, or that cannot be tried, count as such that do not.
    """
    said = getattr(gate, "norm_topk_prob", None)
    if isinstance(said, bool):
        return said
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_PROBED_ROWS, width, generator=generator)
    device = next((one.device for one in gate.parameters()), torch.device("cpu"))
    for shape in ((_PROBED_ROWS, width), (1, _PROBED_ROWS, width)):
        try:
            _, weights, _ = logits_weights_choices(run(rows.view(shape).to(device, dtype)))
        except (RuntimeError, ValueError, TypeError, AttributeError):
            continue
        sums = weights.float().reshape(-1, weights.shape[-1]).sum(-1)
        return bool((sums.max() - sums.min()) <= _EQUAL * sums.abs().mean())
    return False
