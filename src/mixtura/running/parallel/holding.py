"""The tensors of a layer's experts, of which each process holds those it owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from mixtura.errors import UnsupportedModelError, UserError
from mixtura.kernels.backend import math_of, matrix_names
from mixtura.kernels.experts import ExpertMath, StackedExperts
from mixtura.methods.experts.ffn import Ffn
from mixtura.modeling.experts import Experts
from mixtura.modeling.layer import MoELayer, uses_experts
from mixtura.running.parallel.seats import Seats


@final
@dataclass(frozen=True, slots=True)
class Named:
    """A tensor of experts: its name in the module, and along which axis of one expert it can be cut.

    Attributes:
        name: of the parameter.
        role: ``up``, ``down``, ``up_bias`` or ``down_bias``.
        axis: of one expert's tensor, along its hidden features; None where it has none.
        halves: pieces that lie one after the other along that axis: 2 for gate and up.
    """

    name: str
    role: str
    axis: int | None
    halves: int = 1


@final
class Holding:
    """A module of experts, as a process holds it.

    Args:
        module: an experts module of transformers, or a bank of ours; its parameters are cut down to what this
            process owns.
        seats: of its experts.
        rank: of this process.

    Raises:
        UnsupportedModelError: experts whose parameters are not one matrix for each expert.
    """

    def __init__(self, module: nn.Module, seats: Seats, rank: int) -> None:
        self.module: Any = module
        self.names = names_of(module)
        self.seats, self.rank = seats, rank
        parts = seats.at.parts
        if parts > 1:
            self._check_parts(parts)
        self.mine = ((seats.device == rank) & seats.owned).nonzero()[:, 0]
        for named in self.names:
            whole = getattr(self.module, named.name)
            kept = [self._cut(whole.data, named, int(seat)) for seat in self.mine]
            held = torch.stack(kept) if kept else self._cut(whole.data, named, 0)[None][:0]
            made = nn.Parameter(held.clone(), requires_grad=whole.requires_grad)
            self.module.register_parameter(named.name, made)

    def parameters(self) -> list[nn.Parameter]:
        """What this process holds, in the order of ``names``."""
        return [getattr(self.module, named.name) for named in self.names]

    def math(self) -> ExpertMath:
        """What experts compute around their matrices."""
        if isinstance(self.module, Ffn):
            return ExpertMath(self.module.matrices().activation)
        return math_of(self.module)

    def store(self, tensors: Sequence[Tensor]) -> StackedExperts:
        """Experts made of tensors in the order of ``names``."""
        return StackedExperts(**{named.role: one for named, one in zip(self.names, tensors, strict=True)})

    def whole(self, named: Named, pieces: Tensor) -> Tensor:
        """All experts of all seats that own theirs, in the order of seats, as the module had them."""
        owned = self.seats.owned.nonzero()[:, 0]
        parts = self.seats.at.parts
        order = torch.argsort(self.seats.expert[owned] * parts + self.seats.part[owned])
        sorted_pieces: Tensor = pieces[order].unflatten(0, (-1, parts))
        if named.axis is None or parts == 1:
            return sorted_pieces[:, 0]
        axis = named.axis + 1
        split = [one.unflatten(axis, (named.halves, -1)) for one in sorted_pieces.unbind(1)]
        joined: Tensor = torch.cat(split, dim=axis + 1).flatten(axis, axis + 1)
        return joined

    def mine_of(self, named: Named, whole: Tensor) -> Tensor:
        """What this process owns of a tensor of all experts, such as one of an optimizer's states."""
        kept = [self._cut(whole, named, int(seat)) for seat in self.mine]
        return torch.stack(kept) if kept else self._cut(whole, named, 0)[None][:0]

    def _cut(self, whole: Tensor, named: Named, seat: int) -> Tensor:
        expert, part = int(self.seats.expert[seat]), int(self.seats.part[seat])
        one, parts = whole[expert], self.seats.at.parts
        if parts == 1 or named.axis is None:
            return one
        size = one.shape[named.axis] // named.halves // parts
        piece = one.unflatten(named.axis, (named.halves, -1)).narrow(named.axis + 1, part * size, size)
        cut: Tensor = piece.flatten(named.axis, named.axis + 1)
        return cut

    def _check_parts(self, parts: int) -> None:
        width = getattr(self.module, self.names[0].name).shape[1 + (self.names[0].axis or 0)]
        if getattr(self.module, "has_post_expert_norm", False):
            raise UnsupportedModelError(
                "these experts end in a norm, which needs a whole expert's output; choose one without parts"
            )
        if any(named.role == "down_bias" for named in self.names):
            raise UnsupportedModelError(
                "experts with a bias on their output are not cut into parts; choose a placement without parts"
            )
        if width % (self.names[0].halves * parts):
            raise UserError(
                f"experts of {width // self.names[0].halves} hidden features cannot be cut into {parts}; "
                "choose a placement whose parts divide them"
            )


def names_of(module: nn.Module) -> tuple[Named, ...]:
    """The tensors of experts of a module.

    Raises:
        UnsupportedModelError: their parameters are not one matrix for each expert.
    """
    if isinstance(module, Ffn):
        found = [Named("gate_up_proj", "up", 0, 2 if module.gated else 1), Named("down_proj", "down", 1)]
        if module.bias:
            found += [
                Named("up_bias", "up_bias", 0, 2 if module.gated else 1),
                Named("down_bias", "down_bias", None),
            ]
        return tuple(found)
    if "_is_expert_parallel" not in vars(module) or "is_concatenated" not in vars(module):
        raise UnsupportedModelError(
            f"{type(module).__name__} does not hold matrices for each expert, so they cannot lie on several "
            "devices; choose experts such as ffn, or data parallelism"
        )
    told: Any = module
    names = matrix_names(told)
    # Gate and up lie one after the other, or alternate: then a part is a range.
    halves = 2 if told.has_gate and told.is_concatenated else 1
    transposed = bool(told.is_transposed)
    found = [
        Named(names["up"], "up", 1 if transposed else 0, halves),
        Named(names["down"], "down", 0 if transposed else 1),
    ]
    if told.has_bias:
        found += [
            Named(f"{names['up']}_bias", "up_bias", 0, halves),
            Named("down_proj_bias", "down_bias", None),
        ]
    return tuple(found)


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of a model that run experts, by name: those of transformers, and those of our own layers.

    Raises:
        UnsupportedModelError: a layer's experts are a pool, or what decides in it reads or mixes them.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if "_is_expert_parallel" in vars(module) and "is_concatenated" in vars(module):
            found[name] = module
        elif isinstance(module, MoELayer):
            if not isinstance(module.experts, Experts) or uses_experts(module.router):
                raise UnsupportedModelError(
                    f"{type(module.router).__name__} in {name} reads all experts' matrices or those of other "
                    "layers, which no process has; choose a router that only chooses, and no pool"
                )
            found[f"{name}.experts"] = module.experts
    return found


def bank_of(module: nn.Module) -> nn.Module:
    """What holds the parameters of a module of `experts_of`."""
    return module.bank if isinstance(module, Experts) else module
