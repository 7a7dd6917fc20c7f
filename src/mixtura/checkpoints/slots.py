"""The places of a model without weights that tensors of a checkpoint go to."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn


@final
@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter or stored buffer of a model, with every name it has (tied ones have several).

    ``holders`` are the modules and attribute names that hold it.
    """

    names: tuple[str, ...]
    holders: tuple[tuple[nn.Module, str], ...]
    empty: Tensor

    def fill(self, value: Tensor) -> None:
        """Put a tensor in its place everywhere; it is not copied where its dtype is the slot's."""
        value = value.to(self.empty.dtype)
        if isinstance(self.empty, nn.Parameter):
            value = nn.Parameter(value, requires_grad=self.empty.requires_grad)
        self._set(value)

    def clear(self) -> None:
        """Let the tensor go; the slot is on the meta device again."""
        self._set(self.empty)

    def _set(self, value: Tensor) -> None:
        for module, attribute in self.holders:
            held: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
            held[attribute] = value


def slots(model: nn.Module, within: Collection[nn.Module] | None = None) -> tuple[Slot, ...]:
    """The slots that are still empty, in the model's order.

    Args:
        model: a skeleton.
        within: only those held directly by one of these modules.
    """
    names: dict[int, list[str]] = {}
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    found: dict[int, Tensor] = {}
    wanted = None if within is None else {id(module) for module in within}
    for prefix, module in model.named_modules():
        if wanted is not None and id(module) not in wanted:
            continue
        for attribute, tensor in _stored(module):
            if tensor.device.type == "meta":
                names.setdefault(id(tensor), []).append(f"{prefix}.{attribute}" if prefix else attribute)
                holders.setdefault(id(tensor), []).append((module, attribute))
                found[id(tensor)] = tensor
    return tuple(Slot(tuple(names[key]), tuple(holders[key]), tensor) for key, tensor in found.items())


def _stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that a module holds directly and that checkpoints store."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer
