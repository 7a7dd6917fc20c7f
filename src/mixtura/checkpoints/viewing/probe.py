"""Asking a model class, not names, where its experts are counted.

Families call the number of experts ``num_experts``, ``num_local_experts``, ``n_routed_experts``,
``moe_num_experts`` and more, sometimes one number per modality. Building the class twice on the
meta device, with the number changed, shows which config field counts the experts of a stack and
which tensors, along which axis, have one entry per expert.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from mixtura.checkpoints.viewing.meta import build_meta, named_tensors
from mixtura.checkpoints.viewing.sites import ordered_stacks, stack_of
from mixtura.checkpoints.viewing.wrappers import experts_modules
from mixtura.errors import UnsupportedModelError


@final
@dataclass(frozen=True, slots=True)
class CountField:
    """The config attribute that sets how many routed experts a stack of layers has.

    ``path`` are the attribute names from the root config: ``("text_config", "num_experts")``.
    """

    path: tuple[str, ...]

    def read(self, config: Any) -> int:
        """The number of experts a config asks for."""
        return int(getattr(self._owner(config), self.path[-1]))

    def write(self, config: Any, num_experts: int) -> None:
        """Make a config ask for ``num_experts``."""
        setattr(self._owner(config), self.path[-1], num_experts)

    def _owner(self, config: Any) -> Any:
        for part in self.path[:-1]:
            config = getattr(config, part)
        return config


@final
@dataclass(frozen=True, slots=True)
class Probe:
    """What building a model class twice shows: the count field of each stack, and expert axes by name."""

    fields: Mapping[str, CountField]
    expert_axes: Mapping[str, int]


def probe(base: nn.Module, config: Any) -> Probe:
    """Find, for every stack of MoE layers, the config field that counts its experts.

    ``base`` is the model built from ``config``; only its shapes are read.

    Raises `UnsupportedModelError` where a stack's number of experts is set by no single field.
    """
    cls = type(base)
    counts = _expert_counts(base)
    before = {name: tensor.shape for name, tensor in named_tensors(base).items()}
    fields: dict[str, CountField] = {}
    axes: dict[str, int] = {}
    for stack in ordered_stacks([name for name, _ in experts_modules(base)]):
        if stack in fields:
            continue
        for field in _candidates(config, counts[stack]):
            changed = _rebuild(cls, config, field, 2 * counts[stack])
            if changed is None or _expert_counts(changed).get(stack) != 2 * counts[stack]:
                continue
            grown = _expert_counts(changed)
            fields.update({other: field for other in counts if grown.get(other) == 2 * counts[other]})
            axes.update(_changed_axes(before, changed))
            break
        else:
            raise UnsupportedModelError(
                f"no field of the {config.model_type!r} config sets the number of experts of {stack}"
            )
    return Probe(fields, axes)


def width_field(
    base: nn.Module, config: Any, d_expert: int, parameters: Collection[str]
) -> CountField | None:
    """The config field that is the width of experts, where nothing else changes with it; None without one.

    Args:
        base: the model built from ``config``; only its shapes are read.
        config: the config.
        d_expert: the width.
        parameters: of all experts.
    """
    before = {name: tensor.shape for name, tensor in named_tensors(base).items()}
    for field in _fields_equal(config, d_expert, ()):
        changed = _rebuild(type(base), config, field, 2 * d_expert)
        if changed is None:
            continue
        now = {name: tensor.shape for name, tensor in named_tensors(changed).items()}
        if {name for name in {*before, *now} if before.get(name) != now.get(name)} == set(parameters):
            return field
    return None


def _expert_counts(model: nn.Module) -> dict[str, int]:
    """Experts per stack, read from the tensors."""
    return {
        stack_of(name)[0]: module.get_parameter("down_proj").shape[0]
        for name, module in experts_modules(model)
    }


def _candidates(config: Any, num_experts: int) -> Iterator[CountField]:
    """Fields equal to the number of experts, the likeliest first."""
    found = list(_fields_equal(config, num_experts, ()))

    def unlikeliness(field: CountField) -> tuple[bool, bool, int]:
        name = field.path[-1]
        chosen = any(word in name for word in ("per_tok", "topk", "top_k", "shared"))
        return "expert" not in name, chosen, len(field.path)

    yield from sorted(found, key=unlikeliness)


def _fields_equal(config: Any, value: int, prefix: tuple[str, ...]) -> Iterator[CountField]:
    for name, held in vars(config).items():
        if type(held) is int and held == value:
            yield CountField((*prefix, name))
        elif hasattr(held, "model_type") and hasattr(held, "to_dict"):
            yield from _fields_equal(held, value, (*prefix, name))


def _rebuild(cls: type[nn.Module], config: Any, field: CountField, num_experts: int) -> nn.Module | None:
    """The class built with another number in ``field``; `None` where that is no valid config."""
    changed = copy.deepcopy(config)
    try:
        field.write(changed, num_experts)
        return build_meta(cls, changed)
    except Exception:
        # A field that merely happens to equal the number of experts may break the model in any way
        # when it is changed; then it is not the field looked for.
        return None


def _changed_axes(before: Mapping[str, torch.Size], changed: nn.Module) -> dict[str, int]:
    """The axis along which each tensor grew."""
    axes: dict[str, int] = {}
    for name, tensor in named_tensors(changed).items():
        old = before.get(name, tensor.shape)
        grown = [axis for axis, (a, b) in enumerate(zip(old, tensor.shape, strict=True)) if a != b]
        if len(grown) == 1:
            axes[name] = grown[0]
    return axes
