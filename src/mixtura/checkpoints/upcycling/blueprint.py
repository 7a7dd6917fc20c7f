"""From a plan to every tensor of an upcycled checkpoint and what writes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from mixtura.checkpoints.applying.shards import OutputTensor, Unit
from mixtura.checkpoints.dense.view import DenseView
from mixtura.checkpoints.upcycling.attentions import (
    attention_units,
    is_attention,
    num_attention_experts,
    router_units,
)
from mixtura.checkpoints.upcycling.checking import Layers, check_plan
from mixtura.checkpoints.upcycling.experts import Workshop
from mixtura.checkpoints.upcycling.own import begun, widths_of
from mixtura.checkpoints.upcycling.targets import OWN, TARGETS, Names, Target, config_of
from mixtura.checkpoints.upcycling.units import FillValues, Place, SumPieces, WriteExperts, WriteValues
from mixtura.checkpoints.viewing.reader import compute_dtype
from mixtura.errors import UserError
from mixtura.types import Plan
from mixtura.types.upcycling import Approach, Become, Build, Carry, SetRouter

# A switch of zero lets half of a shared expert through: a sigmoid of zero.
_SWITCHED = 2.0
_FEED_FORWARD = ".mlp."


@final
@dataclass(frozen=True, slots=True)
class Blueprint:
    """All of a new checkpoint before its first byte is written: its units in order, and its config."""

    units: tuple[Unit, ...]
    target: Target
    config: Any

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(unit.num_bytes for unit in self.units)


def blueprint(sources: Sequence[DenseView], plan: Plan, arrays: Mapping[str, Tensor]) -> Blueprint:
    """Every tensor that a plan makes of dense models.

    Raises:
        UserError: the plan does not fit them.
    """
    layers = check_plan(sources, plan, arrays)
    base = sources[0]
    become, carry = layers.become, layers.carry
    target = TARGETS[become.family]
    workshop = Workshop(sources, arrays, compute_dtype(base.config))
    writer = _Writer(base, workshop, target.names, become)
    config = config_of(target, base.config, base.traits, become)
    units: list[Unit] = []
    written: set[int] = set()
    for name in base.pieces:
        number = _layer_of(name)
        if layers.attention and is_attention(name):
            units += attention_units(sources, layers.attention, name, writer.dtype)
        elif number is None or _FEED_FORWARD not in name:
            units.append(_carried(sources, carry, name, writer.dtype))
        elif number not in written:
            # Experts stand where the feed-forward part stood.
            written.add(number)
            units += writer.layer(number, layers)
    if target.model_type == OWN:
        set_already = {f"model.layers.{number}.{target.names.router}" for number in layers.routers}
        units += _routers(config, layers, workshop, set_already)
        count = num_attention_experts(become)
        units += router_units(layers.attention_routers, count, base.shape.d_model, writer.dtype)
    return Blueprint(tuple(units), target, config)


def _routers(config: Any, layers: Layers, workshop: Workshop, known: Collection[str]) -> list[Unit]:
    """Parameters of routers and states of balancers: what actions make of them, else as in a new model."""
    new = begun(config)
    filled = {f"model.layers.{fill.layer}.mlp.router.{fill.name}": fill for fill in layers.fills}
    for name in (*filled, *known):
        if name not in new:
            raise UserError(f"the plan sets {name}, which such a model has not; it has {', '.join(new)}")
    units: list[Unit] = []
    for name, value in new.items():
        dtype = workshop.dtype if value.is_floating_point() and ".balance." not in name else value.dtype
        output = OutputTensor(name, dtype, tuple(value.shape))
        if name in filled:
            units.append(FillValues(output, filled[name], workshop))
        elif name not in known:
            units.append(WriteValues(output, value))
    return units


def _layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if name.startswith("model.layers.") else None


def _carried(sources: Sequence[DenseView], carry: Carry, name: str, dtype: torch.dtype) -> SumPieces:
    pieces = tuple(sources[number].pieces[name] for number in carry.sources)
    return SumPieces(OutputTensor(name, dtype, pieces[0].shape), pieces, carry.weights)


@final
@dataclass(frozen=True, slots=True)
class _Writer:
    """Units of the tensors of an MoE layer, under a family's names."""

    base: DenseView
    workshop: Workshop
    names: Names
    become: Become

    @property
    def dtype(self) -> torch.dtype:
        return self.workshop.dtype

    def layer(self, number: int, layers: Layers) -> list[Unit]:
        prefix = f"model.layers.{number}."
        experts = layers.experts[number]
        router = layers.routers.get(number)
        units: list[Unit] = [] if router is None else [self._router(prefix, router)]
        if self.names.correction:
            bias = OutputTensor(prefix + self.names.correction, torch.float32, (len(experts),))
            units.append(WriteValues(bias, torch.zeros(len(experts))))
        units += self._fused(prefix, experts) if self.names.fused else self._apart(prefix, experts)
        shared = layers.shared.get(number)
        return units if shared is None else units + self._shared(prefix, shared)

    def _router(self, prefix: str, action: SetRouter) -> Unit:
        shape = (self.become.num_experts, self.base.shape.d_model)
        output = OutputTensor(prefix + self.names.router, self.dtype, shape)
        if action.init == "rows":
            return WriteValues(output, self.workshop.arrays[str(action.rows)])
        if action.init == "zeros":
            return WriteValues(output, torch.zeros(shape))
        generator = torch.Generator().manual_seed((action.seed * 1_000_003 + action.layer) % (1 << 63))
        return WriteValues(output, torch.randn(shape, generator=generator) * action.std)

    def _apart(self, prefix: str, experts: Sequence[Build | Approach]) -> list[Unit]:
        units: list[Unit] = []
        for number, action in enumerate(experts):
            patterns = (self.names.gate, self.names.up, self.names.down)
            gate, up, down = (prefix + name.format(e=number) for name in patterns)
            units.append(self._one((gate, up, down), action))
        return units

    def _one(
        self, names: tuple[str, str, str], action: Build | Approach, down_scale: float = 1.0
    ) -> WriteExperts:
        d_model, width = self.base.shape.d_model, self.workshop.width(action)
        shapes = ((width, d_model), (width, d_model), (d_model, width))
        outputs = tuple(OutputTensor(n, self.dtype, s) for n, s in zip(names, shapes, strict=True))
        return WriteExperts(outputs, ((action, Place(names)),), self.workshop, down_scale)

    def _fused(self, prefix: str, experts: Sequence[Build | Approach]) -> list[Unit]:
        layer = experts[0].layer
        d_model, width, number = self.base.shape.d_model, widths_of(self.become, layer)[0], len(experts)
        names = (prefix + self.names.gate, prefix + self.names.down)
        outputs = (
            OutputTensor(names[0], self.dtype, (number, 2 * width, d_model)),
            OutputTensor(names[1], self.dtype, (number, d_model, width)),
        )
        size = width * d_model * self.dtype.itemsize
        placed = tuple(
            (action, Place((names[0], names[0], names[1]), (2 * e * size, (2 * e + 1) * size, e * size)))
            for e, action in enumerate(experts)
        )
        return [WriteExperts(outputs, placed, self.workshop)]

    def _shared(self, prefix: str, action: Build) -> list[Unit]:
        names = self.names
        scale = _SWITCHED if names.shared_switch else 1.0
        if names.fused:
            d_model, width = self.base.shape.d_model, self.workshop.width(action)
            gate, down = prefix + names.shared_gate, prefix + names.shared_down
            # A bank of one expert in models of mixtura's own.
            bank = (1,) if self.become.family == OWN else ()
            outputs = (
                OutputTensor(gate, self.dtype, (*bank, 2 * width, d_model)),
                OutputTensor(down, self.dtype, (*bank, d_model, width)),
            )
            place = Place((gate, gate, down), (0, width * d_model * self.dtype.itemsize, 0))
            return [WriteExperts(outputs, ((action, place),), self.workshop, scale)]
        three = (prefix + names.shared_gate, prefix + names.shared_up, prefix + names.shared_down)
        units: list[Unit] = [self._one(three, action, scale)]
        if names.shared_switch:
            switch = OutputTensor(prefix + names.shared_switch, self.dtype, (1, self.base.shape.d_model))
            units.append(WriteValues(switch, torch.zeros(switch.shape)))
        return units
