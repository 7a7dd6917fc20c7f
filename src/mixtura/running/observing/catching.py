"""What statistics read of a whole layer, caught while it runs: the residual stream and router logits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.checkpoints.view import LayerView
from mixtura.checkpoints.viewing.wrappers import inner, submodule
from mixtura.errors import UnsupportedModelError
from mixtura.rerouting.inside import Inside, Outline
from mixtura.types.steering import Steering


@final
@dataclass(slots=True)
class Caught:
    """What was caught of one layer in its last call; None for what nobody reads.

    Attributes:
        residual: the hidden states from which a norm made the experts' inputs.
        logits: the product of the router's features with its matrix.
    """

    residual: Float[Tensor, "T D"] | None = None
    logits: Float[Tensor, "T E"] | None = None


@contextmanager
def catching(model: nn.Module, layer: LayerView, fields: Collection[str]) -> Iterator[Caught]:
    """Catch some fields of `Caught` of a layer whenever it runs, before its experts do.

    Raises:
        UnsupportedModelError: when the layer runs, where it has nothing of the kind.
    """
    caught = Caught()
    with ExitStack() as stack:
        if "residual" in fields:
            stack.enter_context(_catching_residual(model, layer, caught))
        if "logits" in fields:
            stack.enter_context(_catching_logits(model, layer, caught))
        yield caught


@contextmanager
def _catching_residual(model: nn.Module, layer: LayerView, caught: Caught) -> Iterator[None]:
    """Of the norms of a decoder layer, the input of the one whose output goes into the experts.

    Families name and place their norms differently, but all hand the experts, or the block that holds
    them, the very memory a norm has written.
    """
    decoder = _decoder_layer(model, layer)
    block, experts = submodule(model, layer.block_name), submodule(model, layer.name)
    normed: list[tuple[Tensor, Tensor]] = []

    def on_norm(_: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(made, Tensor):
            normed.append((given[0], made))

    def on_block(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        caught.residual = _source(_first(given, named), normed)

    def on_experts(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        found = _source(_first(given, named), normed)
        if found is not None:
            caught.residual = found
        normed.clear()
        if caught.residual is None:
            raise UnsupportedModelError(
                f"no norm of layer {layer.index} makes what its experts are given, so that what they are "
                "added to cannot be told; take statistics that do not read the residual"
            )

    with ExitStack() as stack:
        for module in decoder.modules():
            if _is_norm(module):
                stack.callback(module.register_forward_hook(on_norm).remove)
        if block is not decoder:
            stack.callback(block.register_forward_pre_hook(on_block, with_kwargs=True).remove)
        stack.callback(experts.register_forward_pre_hook(on_experts, with_kwargs=True).remove)
        yield


def _decoder_layer(model: nn.Module, layer: LayerView) -> nn.Module:
    """The decoder layer that holds a MoE layer: what its stack numbers."""
    head, _, tail = layer.stack.partition("*")
    number = layer.name[len(head) : len(layer.name) - len(tail)]
    return submodule(model, f"{head}{number}")


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(inner(module)).__name__.lower() and not list(module.children())


def _first(given: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
    """The hidden states among a module's arguments."""
    return next((one for one in (*given, *named.values()) if isinstance(one, Tensor)), None)


def _source(states: Tensor | None, normed: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """What was normed to give some hidden states, as rows of tokens; None where no norm gave them."""
    if states is None:
        return None
    for before, after in reversed(normed):
        if after.data_ptr() == states.data_ptr() and after.numel() == states.numel():
            return before.reshape(-1, before.shape[-1])
    return None


@contextmanager
def _catching_logits(model: nn.Module, layer: LayerView, caught: Caught) -> Iterator[None]:
    router: Any = submodule(model, layer.router_name)
    shape = tuple(layer.tensor(layer.site.router_weight).shape)
    outline = Outline(
        (shape[0], shape[1]), layer.num_experts, layer.top_k, layer.num_groups, layer.top_groups
    )
    own = vars(router).get("forward")
    router.forward = _watched(router.forward, outline, layer, caught)
    try:
        yield
    finally:
        if own is None:
            del router.forward
        else:
            router.forward = own


def _watched(
    forward: Callable[..., Any], outline: Outline, layer: LayerView, caught: Caught
) -> Callable[..., Any]:
    """A router's forward that also leaves its logits."""

    def watched(*args: Any, **kwargs: Any) -> Any:
        with Inside(outline, Steering()) as inside:
            made = forward(*args, **kwargs)
        if inside.logits is None:
            raise UnsupportedModelError(
                f"the router of layer {layer.index} multiplies tokens with no matrix of a row per expert, so "
                "that it has no logits; take statistics that do not read them"
            )
        logits = torch.as_tensor(inside.logits)
        caught.logits = logits.detach().reshape(-1, logits.shape[-1])[:, : outline.num_experts]
        return made

    return watched
