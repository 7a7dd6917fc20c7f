"""Do sources match each other, and does a plan fit them? Found out before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from mixtura.checkpoints.dense.families import head_dim
from mixtura.checkpoints.dense.view import DenseView
from mixtura.checkpoints.upcycling.attentions import check_attention
from mixtura.checkpoints.upcycling.experts import MATRICES, Workshop
from mixtura.checkpoints.upcycling.own import widths_of
from mixtura.checkpoints.upcycling.targets import OWN
from mixtura.checkpoints.viewing.reader import compute_dtype
from mixtura.errors import UnsupportedModelError, UserError
from mixtura.types import Plan
from mixtura.types.upcycling import (
    Approach,
    Become,
    Build,
    Carry,
    CarryAttention,
    Fill,
    RouteAttention,
    SetRouter,
)

_SHOWN = 5


@final
@dataclass(frozen=True, slots=True)
class Layers:
    """A plan's actions by layer."""

    become: Become
    carry: Carry
    experts: Mapping[int, tuple[Build | Approach, ...]]
    shared: Mapping[int, Build]
    routers: Mapping[int, SetRouter]
    fills: tuple[Fill, ...] = ()
    attention: tuple[CarryAttention, ...] = ()
    attention_routers: tuple[RouteAttention, ...] = ()


def check_sources(sources: Sequence[DenseView]) -> None:
    """Refuse sources that are no variants of one model.

    Raises:
        UnsupportedModelError: they compute otherwise, or a tensor is missing or of another shape; names
            which, tensor by tensor.
    """
    base = sources[0]
    for other in sources[1:]:
        if other.traits != base.traits or other.config.model_type != base.config.model_type:
            raise UnsupportedModelError(
                f"{other.path} ({other.config.model_type}) computes otherwise than {base.path} "
                f"({base.config.model_type}); give models of one family that were made from the same one"
            )
        if _heads(other) != _heads(base):
            raise UnsupportedModelError(
                f"{other.path} has {_heads(other)} as numbers of heads, of key heads and their width, "
                f"{base.path} {_heads(base)}; give models that were made from the same one"
            )
        wrong = _differences(base, other)
        if wrong:
            more = f" and {len(wrong) - _SHOWN} others" if len(wrong) > _SHOWN else ""
            raise UnsupportedModelError(
                f"{other.path} does not match {base.path} in {'; '.join(wrong[:_SHOWN])}{more}; give models "
                "that were made from the same one"
            )


def _heads(view: DenseView) -> tuple[int, int, int]:
    config = view.config
    return (config.num_attention_heads, config.num_key_value_heads, head_dim(config))


def settings_that_differ(sources: Sequence[DenseView]) -> tuple[str, ...]:
    """What configs say otherwise that tensors do not show, in words; the first source's holds."""
    base, *others = sources
    return tuple(
        f"{other.path} has other {name} than {base.path}, whose holds"
        for other in others
        for name in ("rope_parameters", "rms_norm_eps", "max_position_embeddings")
        if getattr(other.config, name, None) != getattr(base.config, name, None)
    )


def _differences(base: DenseView, other: DenseView) -> list[str]:
    found = []
    for name in dict.fromkeys((*base.pieces, *other.pieces)):
        ours, theirs = base.pieces.get(name), other.pieces.get(name)
        if ours is None or theirs is None:
            lacking = other if theirs is None else base
            found.append(f"{name}, which {lacking.path.name} has not")
        elif ours.shape != theirs.shape:
            found.append(f"{name}, {list(theirs.shape)} where {list(ours.shape)} is expected")
    return found


def check_plan(sources: Sequence[DenseView], plan: Plan, arrays: Mapping[str, Tensor]) -> Layers:
    """The plan by layer.

    Raises:
        UserError: an action is of another kind, names what there is not, or something is missing or twice.
    """
    found = _sorted(plan)
    _check_carry(found.carry, len(sources))
    workshop = Workshop(sources, arrays, compute_dtype(sources[0].config))
    become = found.become
    for layer in range(sources[0].shape.num_layers):
        own = found.experts.get(layer, ())
        if [action.expert for action in own] != list(range(become.num_experts)):
            raise UserError(
                f"the plan makes experts {[a.expert for a in own]} of layer {layer}, and 0 to "
                f"{become.num_experts - 1} are needed, each once"
            )
        for action in own:
            _check_expert(action, sources, arrays)
            wanted = widths_of(become, layer)[0]
            if workshop.width(action) != wanted:
                raise UserError(
                    f"the plan makes expert {action.expert} of layer {layer} {workshop.width(action)} wide, "
                    f"and the config says {wanted}"
                )
        _check_shared(layer, found, sources, arrays, workshop)
        if become.family != OWN or layer in found.routers:
            _check_router(found.routers.get(layer), layer, become, arrays, sources[0].shape.d_model)
    for fill in found.fills:
        _check_fill(fill, sources, arrays)
    check_attention(become, found.attention, found.attention_routers, len(sources))
    return found


def _sorted(plan: Plan) -> Layers:
    becomes = [a for a in plan.actions if isinstance(a, Become)]
    carries = [a for a in plan.actions if isinstance(a, Carry)]
    if len(becomes) != 1 or len(carries) != 1:
        raise UserError("a plan that makes experts of dense models has one action become and one carry")
    experts: dict[int, dict[int, Build | Approach]] = {}
    shared: dict[int, Build] = {}
    routers: dict[int, SetRouter] = {}
    for action in plan.actions:
        if isinstance(action, Build) and action.expert is None:
            shared[action.layer] = action
        elif isinstance(action, Build | Approach) and action.expert is not None:
            experts.setdefault(action.layer, {})[action.expert] = action
        elif isinstance(action, SetRouter):
            routers[action.layer] = action
        elif not isinstance(action, Become | Carry | Fill | CarryAttention | RouteAttention):
            raise UserError(f"a plan's action {action.kind!r} is for models that have experts already")
    ordered = {layer: tuple(own[e] for e in sorted(own)) for layer, own in experts.items()}
    fills = tuple(action for action in plan.actions if isinstance(action, Fill))
    if fills and becomes[0].family != OWN:
        raise UserError(f"a plan's action fill is for models of mixtura's own, not for {becomes[0].family}")
    parts = tuple(action for action in plan.actions if isinstance(action, CarryAttention))
    gates = tuple(action for action in plan.actions if isinstance(action, RouteAttention))
    return Layers(becomes[0], carries[0], ordered, shared, routers, fills, parts, gates)


def _check_carry(carry: Carry, num_sources: int) -> None:
    if len(carry.sources) != len(carry.weights) or not carry.sources:
        raise UserError("the action carry of a plan needs a weight for each of its sources")
    for number in carry.sources:
        _check_source(number, num_sources)


def _check_source(number: int, num_sources: int) -> None:
    if not 0 <= number < num_sources:
        raise UserError(f"the plan names source {number}, and there are 0 to {num_sources - 1}")


def _check_expert(
    action: Build | Approach, sources: Sequence[DenseView], arrays: Mapping[str, Tensor]
) -> None:
    _check_source(action.source, len(sources))
    if isinstance(action, Approach):
        _check_source(action.base, len(sources))
        if action.rank < 0:
            raise UserError(f"the plan has a change of rank {action.rank}; give 0 or more")
        return
    width = sources[action.source].shape.d_ffn
    if isinstance(action.neurons, str):
        ids = _array(action.neurons, arrays)
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    else:
        low, high = (0, width - 1) if action.neurons is None else (action.neurons[0], action.neurons[1] - 1)
    if low < 0 or high >= width or low > high:
        raise UserError(f"the plan names neurons {low} to {high} of layer {action.layer}, which has {width}")


def _check_shared(
    layer: int, found: Layers, sources: Sequence[DenseView], arrays: Mapping[str, Tensor], workshop: Workshop
) -> None:
    action = found.shared.get(layer)
    if action is not None:
        _check_expert(action, sources, arrays)
    width = 0 if action is None else workshop.width(action)
    wanted = widths_of(found.become, layer)[1]
    if width != wanted:
        raise UserError(
            f"the plan makes the shared expert of layer {layer} {width} wide, and the config says {wanted}"
        )


def _check_router(
    action: SetRouter | None, layer: int, become: Become, arrays: Mapping[str, Tensor], d_model: int
) -> None:
    if action is None:
        raise UserError(f"the plan says nothing of the router of layer {layer}")
    wanted = (become.num_experts, d_model)
    if action.init == "rows" and tuple(_array(str(action.rows), arrays).shape) != wanted:
        raise UserError(f"the rows of the router of layer {layer} must be of shape {wanted}")


def _check_fill(fill: Fill, sources: Sequence[DenseView], arrays: Mapping[str, Tensor]) -> None:
    _check_source(fill.source, len(sources))
    if (fill.matrix is None) == (fill.values is None) or fill.matrix not in (None, *MATRICES):
        raise UserError(
            f"the plan fills {fill.name} of layer {fill.layer} with {fill.matrix!r}; give values or one of "
            f"the matrices {', '.join(MATRICES)}"
        )
    for name in (fill.values, fill.rows, fill.times):
        if name is not None:
            _array(name, arrays)


def _array(name: str, arrays: Mapping[str, Tensor]) -> Tensor:
    if name not in arrays:
        raise UserError(f"the plan names the array {name}, which does not lie beside it")
    return arrays[name]
