"""Which way each decoder layer of a model runs few tokens, and why not a faster one.

Everything that compiled calls decline is declined with a reason, where it is decided (`Declined`); here the
reasons are put together layer by layer.

>>> from mixtura.kernels.paths import PATHS
>>> PATHS
('whole step', 'both halves', 'attention half', 'experts half', 'experts', 'PyTorch')
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, final, get_args

import torch
from torch import nn

from mixtura.kernels.backend import why_not_compiled
from mixtura.kernels.compiled import options, why_not_native
from mixtura.kernels.step_layer import QuickLayer, found_of, why_not_now, why_unusual
from mixtura.kernels.step_stack import QuickStack, why_not_together, why_unusual_stack
from mixtura.machine.releases import returned_cache, with_cache

Path = Literal["whole step", "both halves", "attention half", "experts half", "experts", "PyTorch"]
# The fastest first: one call for all layers; two for the layer; one for its attention, and one for its
# experts where no reason speaks against that; one for what follows attention; one for the experts; none.
PATHS: Final[tuple[Path, ...]] = get_args(Path)

_NUM_TOKENS: Final = 4
_NUM_STEPS: Final = 2


@final
@dataclass(frozen=True, slots=True)
class LayerPath:
    """How one decoder layer runs a new token of each sequence.

    Attributes:
        layer: the layer's name in the model, such as ``model.layers.0``.
        path: one of `PATHS`, the fastest first. Where there are no experts, ``PyTorch`` still multiplies by
            compiled kernels.
        reason: why it is not the next faster one, in a few clauses; nothing for ``whole step``.
    """

    layer: str
    path: Path
    reason: str


@torch.no_grad()
def paths_of(model: nn.Module, *, probe: bool = True) -> list[LayerPath]:
    """How each decoder layer of a model with experts runs, in order, dense layers among them.

    Args:
        model: a model of transformers, quickened or not, in evaluation mode.
        probe: run a prompt of a few tokens and two steps first, since nothing is known of a model before its
            first text. Without it, what the model ran last is told.
    """
    if probe and not model.training:
        _run(model)
    found = []
    for owner, name, layers in _stacks_of(model):
        why = _why_not_together(owner)
        for number, layer in layers.named_children():
            path, reason = _path_of(layer, why)
            found.append(LayerPath(f"{name}.{number}", path, reason))
    return found


def _run(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (1, _NUM_TOKENS + _NUM_STEPS), generator=generator)
    cache = returned_cache(model(input_ids=ids[:, :_NUM_TOKENS], use_cache=True))
    if cache is None:
        return
    for place in range(_NUM_TOKENS, _NUM_TOKENS + _NUM_STEPS):
        model(input_ids=ids[:, place : place + 1], use_cache=True, **with_cache(cache))


def _stacks_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.ModuleList]]:
    """Lists of layers some of which hold experts: what owns them, their name, and they."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or name.startswith(inside):
            continue
        if any(_experts_of(layer) is not None for layer in module):
            inside += (f"{name}.",)
            yield model.get_submodule(name.rpartition(".")[0]), name, module


def _experts_of(layer: nn.Module) -> Any:
    """The experts in a layer that follow transformers' common contract, or None."""
    return next((m for m in layer.modules() if hasattr(m, "is_transposed") and hasattr(m, "has_gate")), None)


def _why_not_together(owner: nn.Module) -> str:
    if options().mode != "fast":
        return f"the kernels' mode is {options().mode!r}"
    if isinstance(owner, QuickStack):
        return "it is in training" if owner.training else why_not_together(owner)
    return why_unusual_stack(owner) or "it was not quickened since it got its usual form"


def _path_of(layer: nn.Module, why_not_together: str) -> tuple[Path, str]:
    experts = _experts_of(layer)
    why_experts = "" if experts is None else why_not_compiled(experts)
    found = found_of(layer) if isinstance(layer, QuickLayer) else None
    if found is not None and found.is_whole() and not why_not_together:
        return "whole step", ""
    reasons = [_why_not_halves(layer)]
    if found is not None and not reasons[0]:
        if found.is_whole():
            return "both halves", why_not_together
        reasons = [found.why_attention, found.why_mixture]
        if found.attention is not None:
            return "attention half", _together(reasons[1], why_experts)
        if found.mixture is not None and not why_experts:
            return "experts half", reasons[0]
    if experts is None or why_experts:
        return "PyTorch", _together(*reasons, why_experts)
    return "experts", _together(*reasons)


def _why_not_halves(layer: nn.Module) -> str:
    """Why no half of a layer runs in a compiled call, whatever the halves are."""
    if missing := why_not_native():
        return missing
    if not isinstance(layer, QuickLayer):
        return (
            why_unusual(layer) or "it was not quickened: mixtura.load does that, and mixtura.kernels.quicken"
        )
    if layer.training:
        return "it is in training"
    return why_not_now(layer) or ("" if found_of(layer) is not None else "it has not run yet")


def _together(*reasons: str) -> str:
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason))
