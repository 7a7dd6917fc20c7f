"""The balancers of a model: their losses in every forward pass, their states once a step.

A step of the optimizer may see several micro-batches on several processes. Loads are summed over all
of them before any state changes, so that a step's update is that of its whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mixtura.methods import declared_tags
from mixtura.methods.balancers import Balancer
from mixtura.modeling.layer import ExpertPool, Experts, MoELayer
from mixtura.types import BalancerInput, LayerShape, Routing


@final
@dataclass(frozen=True, slots=True)
class Counts:
    """What a whole batch asked for: assignments per expert of each MoE layer, and valid tokens."""

    loads: tuple[Float[Tensor, " E"], ...]
    num_tokens: int

    @staticmethod
    def of(routings: Sequence[Routing]) -> Counts:
        """The counts of one forward pass."""
        asked = (one.load if one.demand is None else one.demand for one in routings)
        num_tokens = int(routings[0].valid.sum()) if routings else 0
        return Counts(tuple(load.double() for load in asked), num_tokens)

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        both = zip(self.loads, other.loads, strict=True)
        return Counts(tuple(a + b for a, b in both), self.num_tokens + other.num_tokens)

    def over_processes(self) -> Counts:
        """The counts of all processes that train together."""
        if not (dist.is_available() and dist.is_initialized()) or not self.loads:
            return self
        device = self.loads[0].device
        flat = torch.cat([*self.loads, torch.tensor([self.num_tokens], device=device).double()])
        dist.all_reduce(flat)
        *loads, num_tokens = flat.split([len(load) for load in self.loads] + [1])
        return Counts(tuple(loads), int(num_tokens))

    @property
    def table(self) -> Float[Tensor, "L E"] | None:
        """The loads of all layers; None where layers have different numbers of experts."""
        return torch.stack(self.loads) if len({len(load) for load in self.loads}) == 1 else None


@final
class LayerBalance(nn.Module):
    """The balancers of one MoE layer and their states."""

    def __init__(self, balancers: Sequence[Balancer], shape: LayerShape) -> None:
        super().__init__()
        self.balancers = tuple(balancers)
        self._names: list[list[str]] = []
        for place, balancer in enumerate(self.balancers):
            state = balancer.start(shape)
            self._names.append(list(state))
            for name, value in state.items():
                kept = value.detach().clone()
                if value.requires_grad:
                    self.register_parameter(f"{place}_{name}", nn.Parameter(kept))
                else:
                    self.register_buffer(f"{place}_{name}", kept)
        width = 3 * shape.d_model * shape.d_expert
        needed = any("reads:gradients" in declared_tags(type(one)) for one in self.balancers)
        gradients = torch.zeros(shape.num_experts, width) if needed else None
        self.register_buffer("gradients", gradients)

    def state(self, place: int) -> dict[str, Tensor]:
        """The state of one balancer."""
        return {name: getattr(self, f"{place}_{name}") for name in self._names[place]}

    def _entries(self, name: str) -> list[Tensor]:
        return [self.state(place)[name] for place, names in enumerate(self._names) if name in names]

    @property
    def bias(self) -> Float[Tensor, " E"] | None:
        """What is added to scores when experts are chosen."""
        found = self._entries("bias")
        return torch.stack(found).sum(0) if found else None

    @property
    def allowed(self) -> Bool[Tensor, " E"] | None:
        """The experts that may be chosen."""
        found = self._entries("allowed")
        return torch.stack(found).all(0) if found else None

    @property
    def updates(self) -> bool:
        """Whether any balancer changes its state."""
        return any(type(one).update is not Balancer.update for one in self.balancers)

    def loss(self, inputs: Callable[[int], BalancerInput]) -> Float[Tensor, ""] | None:
        """The balancers' losses together; None without balancers."""
        found = [one.loss(inputs(place)) for place, one in enumerate(self.balancers)]
        return torch.stack([loss.float() for loss in found]).sum() if found else None

    @torch.no_grad()
    def update(self, inputs: Callable[[int], BalancerInput]) -> None:
        """Let every balancer change its state."""
        for place, balancer in enumerate(self.balancers):
            state = self.state(place)
            for name, value in balancer.update(inputs(place)).items():
                if not isinstance(state[name], nn.Parameter):
                    state[name].copy_(value)


@final
class ModelBalance(nn.Module):
    """The balancers of all MoE layers, the count of optimizer steps, and what a step has seen so far."""

    def __init__(self, layers: Sequence[LayerBalance], seed: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.seed = seed
        self.num_parts = 0
        self.whole: Counts | None = None
        self._seen: Counts | None = None
        self._last: tuple[tuple[Routing, ...], Int[Tensor, " T"]] | None = None

    def of(self, place: int) -> LayerBalance:
        """The balancers of one MoE layer."""
        found = self.layers[place]
        assert isinstance(found, LayerBalance)
        return found

    def losses(
        self, blocks: Sequence[MoELayer], routings: Sequence[Routing], sequence_ids: Int[Tensor, " T"]
    ) -> Float[Tensor, ""]:
        """Everything routing adds to the training loss: the routers' own losses and the balancers'."""
        total = routings[0].scores.new_zeros((), dtype=torch.float32)
        for place, (block, routing) in enumerate(zip(blocks, routings, strict=True)):
            for own in routing.losses.values():
                total = total + own.float()
            balancing = self.of(place).loss(
                partial(self._inputs, place, block, routing, self.whole, sequence_ids)
            )
            total = total if balancing is None else total + balancing
        return total

    def _inputs(
        self,
        place: int,
        block: MoELayer,
        routing: Routing,
        counts: Counts | None,
        sequence_ids: Int[Tensor, " T"],
        which: int,
    ) -> BalancerInput:
        layer = self.of(place)
        tags = declared_tags(type(layer.balancers[which]))
        step = int(self.step)
        fields: dict[str, Any] = {"routing": routing, "state": layer.state(which), "step": step}
        if counts is not None:
            fields |= {"load": counts.loads[place], "loads": counts.table, "num_tokens": counts.num_tokens}
        if "reads:generator" in tags:
            mixed = hash((self.seed, step, place, which)) % (1 << 62)
            fields["generator"] = torch.Generator().manual_seed(mixed)
        if "reads:sequence_ids" in tags:
            fields["sequence_ids"] = sequence_ids
        if "reads:experts" in tags:
            fields["experts"] = block.experts.matrices
        if "reads:router_weight" in tags:
            fields["router_weight"] = getattr(block.router, "weight", None)
        if "reads:gradients" in tags and step:
            fields["gradients"] = layer.gradients
        return BalancerInput(**fields)

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing], sequence_ids: Int[Tensor, " T"]) -> None:
        """Count a micro-batch that is trained on; the states change in `end_step`."""
        self.num_parts += 1
        if not any(self.of(place).updates for place in range(len(routings))):
            return
        if self.whole is None:
            counts = Counts.of(routings)
            self._seen = counts if self._seen is None else self._seen.plus(counts)
        self._last = tuple(_detached(one) for one in routings), sequence_ids

    @torch.no_grad()
    def end_step(self, blocks: Sequence[MoELayer]) -> None:
        """Change the balancers' states after a step of the optimizer, while gradients are still there.

        Every process that trains together calls it.
        """
        if self._last is not None:
            routings, sequence_ids = self._last
            counts = self.whole or (self._seen.over_processes() if self._seen is not None else None)
            for place, (block, routing) in enumerate(zip(blocks, routings, strict=True)):
                self.of(place).update(partial(self._inputs, place, block, routing, counts, sequence_ids))
        for place, block in enumerate(blocks):
            kept = self.of(place).gradients
            if isinstance(kept, Tensor):
                kept.copy_(_gradients(block.experts))
        self.step += 1
        self.num_parts, self.whole, self._seen, self._last = 0, None, None, None


def _detached(routing: Routing) -> Routing:
    extra = None if routing.extra is None else routing.extra.detach()
    state = None if routing.state is None else routing.state.detach()
    return replace(
        routing,
        weights=routing.weights.detach(),
        scores=routing.scores.detach(),
        logits=routing.logits.detach(),
        losses=_without_gradient(routing.losses),
        history={},
        extra=extra,
        state=state,
    )


def _without_gradient(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: loss.detach() for name, loss in losses.items()}


def _gradients(experts: nn.Module) -> Float[Tensor, "E P"]:
    """Each expert's gradient, flattened; zeros where it has none."""
    if isinstance(experts, ExpertPool):
        return torch.cat([_gradients(member) for member in experts.members])
    assert isinstance(experts, Experts)
    parameters = (experts.gate_up_proj, experts.down_proj)
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten(1) for p in parameters], dim=1
    )
