"""Dropping experts from a model in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from mixtura.checkpoints.viewing.droppable import Drops, check_drops, cut
from mixtura.checkpoints.viewing.memory import MemoryLayer, MemoryView
from mixtura.checkpoints.viewing.meta import build_meta
from mixtura.checkpoints.viewing.probe import CountField
from mixtura.errors import UserError

Model = TypeVar("Model", bound=nn.Module)
Kept = Mapping[int, Sequence[int]]


def drop_experts(model: Model, drops: Drops) -> Model:
    """Remove experts from ``model``, in place; those that stay keep their order.

    ``drops`` maps a layer's index to the experts to remove from it. Where every layer keeps as many,
    the config says so and the model saves as an ordinary checkpoint; where they differ, the model
    runs but no single number in its config can describe it.

    Raises `UserError` where experts cannot go: see `mixtura.checkpoints.viewing.droppable.check_drops`.
    """
    view = MemoryView(model)
    kept = check_drops(view.layers, drops)
    _check_plain(view.layers)
    _check_tied(view.layers, kept)
    fields = view.count_fields
    old_config = copy.deepcopy(view.config)
    done: dict[int, Tensor] = {}
    for layer in view.layers:
        if len(kept[layer.index]) < layer.num_experts:
            _cut_layer(view.model, layer, kept[layer.index], done)
    for field in set(fields.values()):
        layers = [layer for layer in view.layers if fields[layer.stack] == field]
        _update_attributes(view.model, layers, field, kept, old_config)
    return model


def _tensors(layer: MemoryLayer) -> dict[str, int]:
    """Every tensor of a layer with an expert axis, and that axis."""
    return {**dict.fromkeys(layer.expert_parameters, 0), **layer.per_expert_tensors()}


def _check_plain(layers: Sequence[MemoryLayer]) -> None:
    for layer in layers:
        if getattr(layer.experts, "mixtura_store", None) is not None:
            raise UserError(
                f"the experts of layer {layer.index} are packed, not plain tensors; drop experts from the "
                "original model"
            )


def _check_tied(layers: Sequence[MemoryLayer], kept: Kept) -> None:
    """Layers that share their experts' tensors must lose the same experts."""
    first: dict[int, int] = {}
    for layer in layers:
        for name in layer.expert_parameters:
            other = first.setdefault(layer.tensor(name).data_ptr(), layer.index)
            if tuple(kept[other]) != tuple(kept[layer.index]):
                raise UserError(
                    f"layers {other} and {layer.index} share their experts; drop the same experts of both"
                )


def _cut_layer(model: nn.Module, layer: MemoryLayer, kept: Sequence[int], done: dict[int, Tensor]) -> None:
    """Replace every tensor with an expert axis by its cut; ``done`` keeps tied tensors tied."""
    for name, axis in _tensors(layer).items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        old = getattr(owner, leaf)
        assert isinstance(old, Tensor)
        if id(old) not in done:
            smaller = cut(old.detach(), axis, kept, layer.num_experts)
            is_parameter = isinstance(old, nn.Parameter)
            done[id(old)] = nn.Parameter(smaller, old.requires_grad) if is_parameter else smaller
        setattr(owner, leaf, done[id(old)])


def _update_attributes(
    model: nn.Module, layers: Sequence[MemoryLayer], field: CountField, kept: Kept, old_config: Any
) -> None:
    """Make the config and the modules' own counts agree with the tensors they now hold."""
    counts = {len(kept[layer.index]) for layer in layers}
    uniform = len(counts) == 1
    for count in counts:
        config = copy.deepcopy(old_config)
        field.write(config, count)
        before, after = build_meta(type(model), old_config), build_meta(type(model), config)
        if uniform:
            field.write(model.config, count)
            _copy_counts(model, before, after, "")
            return
        for layer in layers:
            if len(kept[layer.index]) == count:
                _copy_counts(model, before, after, layer.block_name)
                # Some routers read the number from the config; the experts must keep the shared one,
                # through which their implementation is chosen.
                _give_config(layer.router, field, count)


def _copy_counts(model: nn.Module, before: nn.Module, after: nn.Module, prefix: str) -> None:
    """Set the whole-number attributes that differ between ``before`` and ``after`` under ``prefix``."""
    changed = dict(after.named_modules(prefix=""))
    modules = dict(model.named_modules())
    for name, module in before.named_modules():
        if prefix and not f"{name}.".startswith(f"{prefix}."):
            continue
        new = vars(changed[name])
        for attribute, value in vars(module).items():
            if type(value) is int and new.get(attribute, value) != value:
                setattr(modules[name], attribute, new[attribute])


def _give_config(router: nn.Module, field: CountField, count: int) -> None:
    for module in router.modules():
        own = getattr(module, "config", None)
        if own is not None and hasattr(own, field.path[-1]):
            own = copy.copy(own)
            CountField(field.path[-1:]).write(own, count)
            vars(module)["config"] = own
