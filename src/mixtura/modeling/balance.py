"""The balancers of a model: their losses in every forward pass, their states once a step.

A step of the optimizer may see several micro-batches on several processes. Loads are summed over all
of them before any state changes, so that a step's update is that of its whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mixtura.errors import UserError
from mixtura.methods import declared_tags
from mixtura.methods._precision import exact, full_precision
from mixtura.methods.balancers import Balancer
from mixtura.modeling.experts import ExpertPool, Experts
from mixtura.modeling.layer import MoELayer
from mixtura.modeling.parts import expert_rows
from mixtura.types import BalancerInput, LayerShape, Routing

# The entries of a state that whoever routes reads. Ties between experts are read by layers of our own alone.
ROUTED_BY = ("bias", "allowed")
OWN_LAYERS_READ = (*ROUTED_BY, "alpha")


@final
@dataclass(frozen=True, slots=True)
class Counts:
    """What a batch asked for: assignments per expert of each MoE layer, valid tokens, labels that count.

    ``num_parts`` says of how many micro-batches, those of all processes together, it is made.
    """

    loads: tuple[Float[Tensor, " _"], ...]
    num_tokens: int
    num_labels: int = 0
    num_parts: int = 1

    @staticmethod
    def of(routings: Sequence[Routing], num_labels: int = 0) -> Counts:
        """The counts of one forward pass."""
        asked = (one.load if one.demand is None else one.demand for one in routings)
        num_tokens = int(routings[0].valid.sum()) if routings else 0
        return Counts(tuple(load.double() for load in asked), num_tokens, num_labels)

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        both = zip(self.loads, other.loads, strict=True)
        return Counts(
            tuple(a + b for a, b in both),
            self.num_tokens + other.num_tokens,
            self.num_labels + other.num_labels,
            self.num_parts + other.num_parts,
        )

    def over_processes(self) -> Counts:
        """The counts of all processes that train together."""
        if not (dist.is_available() and dist.is_initialized()) or not self.loads:
            return self
        numbers = self.loads[0].new_tensor([self.num_tokens, self.num_labels, self.num_parts])
        flat = torch.cat([*self.loads, numbers])
        dist.all_reduce(flat)
        *loads, summed = flat.split([len(load) for load in self.loads] + [len(numbers)])
        return Counts(tuple(loads), *(int(number) for number in summed.tolist()))

    @property
    def table(self) -> Float[Tensor, "L E"] | None:
        """The loads of all layers; None where layers have different numbers of experts."""
        return torch.stack(self.loads) if len({len(load) for load in self.loads}) == 1 else None


@final
class LayerBalance(nn.Module):
    """The balancers of one MoE layer and their states.

    States are in float32 at least, whatever dtype the model is made in or moved to: small steps would
    vanish in bfloat16.

    Args:
        balancers: in the order in which their losses are added up.
        shape: of the layer.
        read: the entries of a state that whoever routes here reads.

    Raises:
        UserError: a balancer trains an entry that is not read, or does not fit the shape.
    """

    def __init__(
        self, balancers: Sequence[Balancer], shape: LayerShape, read: Collection[str] = ROUTED_BY
    ) -> None:
        super().__init__()
        self.balancers = tuple(balancers)
        self._names: list[list[str]] = []
        for place, balancer in enumerate(self.balancers):
            state = balancer.start(shape)
            self._names.append(list(state))
            for name, value in state.items():
                kept = value.detach().clone()
                kept = exact(kept) if kept.is_floating_point() else kept
                if not value.requires_grad:
                    self.register_buffer(f"{place}_{name}", kept)
                    continue
                if name not in read:
                    raise UserError(
                        f"{type(balancer).__name__} trains {name}, which nothing in this model reads, so it "
                        "would change nothing; choose another balancer, or settings of it that train nothing"
                    )
                self.register_parameter(f"{place}_{name}", nn.Parameter(kept))
        # Whether `keep_gradients` is to be called.
        self.keeps_gradients = any("reads:gradients" in declared_tags(type(one)) for one in self.balancers)
        # As large as the experts, and of use for one step: no part of a checkpoint.
        self.gradients: Tensor | None
        self.register_buffer("gradients", None, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerBalance:
        """Move the states, and leave their dtypes where the new one is less exact."""

        def moved(value: Tensor) -> Tensor:
            made = fn(value)
            if not value.is_floating_point() or torch.promote_types(made.dtype, value.dtype) == made.dtype:
                return made
            return value.to(made.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

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
        """The experts that may be chosen in training."""
        found = self._entries("allowed")
        return torch.stack(found).all(0) if found else None

    @property
    def ties(self) -> Float[Tensor, "E E"] | None:
        """How much each expert is tied to each other one, before a sigmoid."""
        found = self._entries("alpha")
        return torch.stack(found).sum(0) if found else None

    @property
    def updates(self) -> bool:
        """Whether any balancer changes its state."""
        return any(type(one).update is not Balancer.update for one in self.balancers)

    @property
    def averages(self) -> bool:
        """Whether any state is the mean of those that the parts of a step give."""
        return any(averaged(one) for one in self.balancers)

    def loss(self, inputs: Callable[[int], BalancerInput]) -> Float[Tensor, ""] | None:
        """The balancers' losses together, in float32 at least; None without balancers."""
        with full_precision():
            found = [one.loss(inputs(place)) for place, one in enumerate(self.balancers)]
        return torch.stack([exact(loss) for loss in found]).sum() if found else None

    @torch.no_grad()
    def update(self, parts: Sequence[Callable[[int], BalancerInput]]) -> None:
        """Let every balancer change its state after a step, whose parts are given."""
        for place, balancer in enumerate(self.balancers):
            if type(balancer).update is Balancer.update:
                continue
            used = parts if averaged(balancer) else parts[-1:]
            made = [balancer.update(inputs(place)) for inputs in used]
            for name, held in self.state(place).items():
                if not isinstance(held, nn.Parameter):
                    values = [state[name] for state in made]
                    held.copy_(mean_of_parts(values) if averaged(balancer) else values[0])

    @torch.no_grad()
    def keep_gradients(self, *matrices: Float[Tensor, "_ R D"]) -> None:
        """Keep the gradient of each expert's matrices that read a token, where a balancer asks for it."""
        if self.keeps_gradients:
            slopes = [torch.zeros_like(one) if one.grad is None else one.grad for one in matrices]
            self.gradients = torch.cat([slope.flatten(1) for slope in slopes])


def averaged(balancer: Balancer) -> bool:
    """Whether each part of a step gives a state of its own, whose mean is that of the step."""
    tags = declared_tags(type(balancer))
    return "whole_batch" in tags and type(balancer).update is not Balancer.update


def mean_of_parts(values: Sequence[Tensor]) -> Tensor:
    """The mean over parts of a batch, of all processes."""
    mean = torch.stack([value.double() for value in values]).mean(0)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.to(values[0].dtype)


@final
class ModelBalance(nn.Module):
    """The balancers of all MoE layers, the count of optimizer steps, and what a step has seen so far."""

    def __init__(self, layers: Sequence[LayerBalance], seed: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.seed = seed
        every = [one for layer in layers for one in layer.balancers]
        self._sums_counts = any("global_counts" in declared_tags(type(one)) for one in every)
        self._averages = any(layer.averages for layer in layers)
        self._updates = any(layer.updates for layer in layers)
        self._forget()

    def _forget(self) -> None:
        """Nothing is known of the step that begins."""
        self.num_parts = 0
        self.whole: Counts | None = None
        self._ahead: Counts | None = None
        self._so_far: Counts | None = None
        self._seen: Counts | None = None
        self._parts: list[tuple[tuple[Routing, ...], Int[Tensor, " T"]]] = []

    def of(self, place: int) -> LayerBalance:
        """The balancers of one MoE layer."""
        found = self.layers[place]
        assert isinstance(found, LayerBalance)
        return found

    def count_ahead(self, counts: Counts) -> None:
        """Take the counts of all of this process's micro-batches in the step that begins.

        Every process that trains together calls it.
        """
        self._ahead, self.whole = counts, counts.over_processes()

    def losses(
        self,
        blocks: Sequence[MoELayer],
        routings: Sequence[Routing],
        sequence_ids: Int[Tensor, " T"],
        *,
        again: bool = False,
    ) -> Float[Tensor, ""]:
        """Everything routing adds to the training loss: the routers' own losses and the balancers'.

        ``again`` says that it is another pass over tokens that were counted before.
        """
        if self._sums_counts and self.whole is None and not again:
            here = Counts.of(routings).over_processes()
            self._so_far = here if self._so_far is None else self._so_far.plus(here)
        total = routings[0].scores.new_zeros((), dtype=torch.float32)
        for place, (block, routing) in enumerate(zip(blocks, routings, strict=True)):
            for own in routing.losses.values():
                total = total + own.float()
            balancing = self.of(place).loss(
                partial(self._inputs, place, block, routing, self.whole, sequence_ids)
            )
            total = total if balancing is None else total + balancing
        return total

    def weight(
        self, num_tokens: int, num_labels: Tensor | int, num_items: Tensor | int | None
    ) -> Tensor | float:
        """What a part's loss is multiplied by, so that a step's is that of its whole batch.

        Whoever gives ``num_items``, the labels of the whole step, adds up its parts' losses. Else they are
        averaged, over micro-batches and over processes.
        """
        if self.whole is None:
            return 1.0 if num_items is None else share_of(num_labels, num_items)
        share = num_tokens / max(self.whole.num_tokens, 1)
        if num_items is None:
            return share * self.whole.num_parts
        return share * self._processes_averaged(int(num_items))

    def _processes_averaged(self, num_items: int) -> int:
        """Over how many processes the caller averages losses: 1 where it has counted the labels of all."""
        assert self._ahead is not None
        assert self.whole is not None
        own, whole = self._ahead.num_labels, self.whole.num_labels
        if not dist.is_initialized() or abs(num_items - whole) <= abs(num_items - own):
            return 1
        return dist.get_world_size()

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
        if counts is None and "global_counts" in tags:
            counts = self._so_far
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
            fields["router_weight"] = expert_rows(block.router)
        if "reads:gradients" in tags:
            fields["gradients"] = layer.gradients
        return BalancerInput(**fields)

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing], sequence_ids: Int[Tensor, " T"]) -> None:
        """Count a micro-batch that is trained on; the states change in `end_step`."""
        self.num_parts += 1
        if not self._updates:
            return
        if self.whole is None:
            counts = Counts.of(routings)
            self._seen = counts if self._seen is None else self._seen.plus(counts)
        if not self._averages:
            self._parts.clear()
        self._parts.append((tuple(_detached(one) for one in routings), sequence_ids))

    @torch.no_grad()
    def end_step(self, blocks: Sequence[MoELayer]) -> None:
        """Change the balancers' states after a step of the optimizer, while gradients are still there.

        Every process that trains together calls it.
        """
        if self._parts:
            counts = self.whole or (self._seen.over_processes() if self._seen is not None else None)
            for place, block in enumerate(blocks):
                parts = [
                    partial(self._inputs, place, block, routings[place], counts, sequence_ids)
                    for routings, sequence_ids in self._parts
                ]
                self.of(place).update(parts)
        for place, block in enumerate(blocks):
            self.of(place).keep_gradients(*_matrices(block.experts))
        self.step += 1
        self._forget()


def share_of(count: Tensor | int, total: Tensor | int) -> Tensor | float:
    """A part's share of a step; of a step in which nothing counts it is 0."""
    share = count / torch.as_tensor(total).clamp(min=1)
    return share if isinstance(share, Tensor) else float(share)


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
        modulation=None,
        state=state,
    )


def _without_gradient(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: loss.detach() for name, loss in losses.items()}


def _matrices(experts: nn.Module) -> list[Tensor]:
    """The matrices that read a token, one tensor for every module of experts."""
    members = experts.banks if isinstance(experts, ExpertPool) else (experts,)
    held = [member for member in members if isinstance(member, Experts)]
    return [member.gate_up_proj for member in held if "own_matrices" in member.tags]
