"""The experts of a transformers model, handed to methods that read them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mixtura.checkpoints.view import MemoryLayer
from mixtura.checkpoints.viewing.wrappers import ADAPTED, is_elsewhere, submodule
from mixtura.errors import UnsupportedModelError
from mixtura.modeling.layer import ExpertMatrices


def experts_of(layer: MemoryLayer) -> ExpertMatrices:
    """The experts of a layer as tensors that routers and balancers may read, run and merge.

    Raises:
        UnsupportedModelError: the family stores its experts in a way of its own.
    """
    experts: Any = layer.experts
    layout = layer.layout
    if getattr(_outermost(layer), ADAPTED, None) is not None:
        raise UnsupportedModelError(
            f"{type(experts).__name__} has adapters, without which it cannot be handed to methods that read "
            "experts; merge the adapters, or choose a method without the tag reads:experts"
        )
    stored = not hasattr(experts, "mixtura_store")
    if layout.transposed or layout.interleaved or layout.has_bias or layout.has_post_norm or not stored:
        raise UnsupportedModelError(
            f"{type(experts).__name__} stores its experts as {layout.name}, in which they cannot be handed "
            "to methods that read experts; choose a method without the tag reads:experts"
        )
    held: Tensor = experts.down_proj
    if held.ndim != 3 or is_elsewhere(held):
        raise UnsupportedModelError(
            f"{type(experts).__name__} is offloaded or sharded, so that its weights are there for its own "
            "forward only; choose a method without the tag reads:experts"
        )
    if layout.has_gate:
        return ExpertMatrices(experts.gate_up_proj, experts.down_proj, activation=experts._apply_gate)
    return ExpertMatrices(experts.up_proj, experts.down_proj, activation=experts.act_fn, gated=False)


def _outermost(layer: MemoryLayer) -> nn.Module:
    """The experts with whatever wraps them."""
    owner, _, leaf = layer.name.rpartition(".")
    found = getattr(submodule(layer._model, owner), leaf)
    assert isinstance(found, nn.Module)
    return found
