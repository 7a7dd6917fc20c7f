"""`mixtura.parallelize`: a model whose experts lie on several processes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from mixtura import __version__
from mixtura.errors import UnsupportedModelError, UserError
from mixtura.kernels.backend import NAME
from mixtura.methods import create
from mixtura.methods.exchanges import Exchange
from mixtura.methods.placements import Placer
from mixtura.running.parallel.holding import Holding, bank_of, experts_of
from mixtura.running.parallel.layer import LayerExchange, summed_square
from mixtura.running.parallel.planning import trace_of_sizes
from mixtura.running.parallel.seats import Seats
from mixtura.running.parallel.wire import Wire
from mixtura.types.placement import Cluster, LayerPlacement, Link, Placement

_NUMBER = re.compile(r"\.(\d+)(?=\.)")
# What placers that choose copies by time are told of links whose speed nobody knows.
_ANY_LINK = Link(latency_s=0.0, bytes_per_s=1e10)


@final
class Parallel:
    """What `parallelize` made of a model: gradients, checkpoints and counts of it.

    Attributes:
        model: the model, whose experts' parameters are this process's own.
        wire: what was sent.
        layers: by name of the experts module, how it runs.
        placement: where experts lie.
    """

    def __init__(
        self, model: nn.Module, wire: Wire, layers: Mapping[str, LayerExchange], placement: Placement
    ) -> None:
        self.model, self.wire, self.layers, self.placement = model, wire, dict(layers), placement

    def expert_names(self) -> dict[str, tuple[Holding, int]]:
        """By name of each parameter of experts, what holds it and its place in that."""
        found = {}
        modules = {id(module): name for name, module in self.model.named_modules()}
        for layer in self.layers.values():
            prefix = modules[id(layer.holding.module)]
            for place, named in enumerate(layer.holding.names):
                found[f"{prefix}.{named.name}"] = (layer.holding, place)
        return found

    def reduce_gradients(self) -> None:
        """Average the gradients of what every process has; those of experts are whole already."""
        own = {id(p) for layer in self.layers.values() for p in layer.holding.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) in own or not parameter.requires_grad:
                continue
            # Where one process has no gradient another may have one: all take part.
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(grad, group=self.wire.group)
            parameter.grad = grad / self.wire.size

    def clip_gradients(self, most: float) -> Tensor:
        """Scale gradients so that their norm, over all processes' experts, is at most ``most``; the norm."""
        own = {id(p) for layer in self.layers.values() for p in layer.holding.parameters()}
        every = [p for p in self.model.parameters() if p.grad is not None]
        experts = summed_square([p.grad for p in every if id(p) in own and p.grad is not None])
        dist.all_reduce(experts, group=self.wire.group)
        norm = (
            experts + summed_square([p.grad for p in every if id(p) not in own and p.grad is not None])
        ).sqrt()
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        for parameter in every:
            assert parameter.grad is not None
            parameter.grad.mul_(factor.to(parameter.grad.dtype))
        return norm

    def end_step(self) -> None:
        """A step of training is over: copies of the next one are chosen by what was seen up to here."""
        for layer in self.layers.values():
            layer.end_step()

    def state_dict(self) -> dict[str, Tensor] | None:
        """The whole model's tensors, as one process has them, on process 0; None on the others."""
        experts = self.expert_names()
        found: dict[str, Tensor] = {}
        for name, value in self.model.state_dict().items():
            whole = self.gathered(name, value) if name in experts else value
            if whole is not None:
                found[name] = whole
        return found if self.wire.rank == 0 else None

    def gathered(self, name: str, mine: Tensor) -> Tensor | None:
        """A tensor of experts by this process's part of it, whole on process 0; None on the others.

        ``mine`` is the parameter called ``name``, its gradient, or a state that an optimizer keeps for it.
        """
        holding, place = self.expert_names()[name]
        seats = holding.seats
        counts = [int(((seats.device == d) & seats.owned).sum()) for d in range(self.wire.size)]
        to_first = [len(mine), *[0] * (self.wire.size - 1)]
        coming = counts if self.wire.rank == 0 else [0] * self.wire.size
        kept = self.wire.sent.copy()
        pieces = self.wire.move(mine.detach().flatten(1), to_first, coming, "all")
        self.wire.sent = kept
        if self.wire.rank:
            return None
        return holding.whole(holding.names[place], pieces.unflatten(1, mine.shape[1:]))

    def mine_of(self, name: str, whole: Tensor) -> Tensor:
        """What this process owns of a tensor of all experts; the other way of `gathered`."""
        holding, place = self.expert_names()[name]
        return holding.mine_of(holding.names[place], whole)

    def save(self, directory: str | Path) -> None:
        """Write an ordinary checkpoint, by process 0, that any number of processes loads."""
        state = self.state_dict()
        if state is not None:
            told: Any = self.model
            told.save_pretrained(directory, state_dict=state)
        dist.barrier(group=self.wire.group)


def parallelize(
    model: nn.Module,
    mesh: Any = None,
    placement: Placement | Placer | str = "contiguous",
    *,
    exchange: Exchange | str = "flat",
    average: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> Parallel:
    """Lay a model's experts on the processes of a mesh; what else it has stays whole on each.

    Every process gives the same model, and then its own tokens: outputs are those of one process, and
    gradients those of the mean of the processes' losses (call `Parallel.reduce_gradients` after the backward
    pass, or wrap the model in DistributedDataParallel, which leaves experts alone). Rows go to experts in
    all-to-alls with uneven splits, without padding and without dropping any.

    Args:
        model: of transformers, whose experts follow the common contract, or of our own.
        mesh: a `torch.distributed.device_mesh.DeviceMesh` of one dimension, or of two, nodes and their
        devices;
            None for all processes in one node.
        placement: where experts lie: what `mixtura plan --save` wrote, a method of the kind placements, or
        its
            name; methods that read how busy experts are take all to be as busy.
        exchange: how rows travel: a method of the kind exchanges, or its name.
        average: whether the loss is the mean over processes of theirs, or their sum.
        settings: of a placement that is named.

    Raises:
        UserError: processes differ in model, placement or versions; the mesh or the placement does not fit.
        UnsupportedModelError: the model's experts cannot lie on several processes, or it is not on the CPU.
    """
    group, devices_per_node = _group(mesh)
    experts = experts_of(model)
    if not experts:
        raise UnsupportedModelError(f"{type(model).__name__} has no experts; use data parallelism for it")
    if any(getattr(module, "mixtura_exchange", None) is not None for module in experts.values()):
        raise UserError(
            "this model's experts lie on several processes already; load it again to lay them anew"
        )
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise UnsupportedModelError(
            "experts are laid on processes that compute on the CPU; move the model there"
        )
    placer = create("placements", placement, **(settings or {})) if isinstance(placement, str) else placement
    wire = Wire(group, devices_per_node)
    sizes = {name: sizes_of(module) for name, module in experts.items()}
    cluster = _cluster(wire)
    planned = placer if isinstance(placer, Placement) else _planned(placer, sizes, cluster)
    wire.agree(_facts(model, planned, exchange))
    _check(planned, sizes, wire)
    made = create("exchanges", exchange) if isinstance(exchange, str) else exchange
    stepping = placer if isinstance(placer, Placer) and type(placer).step is not Placer.step else None
    share = 1 / wire.size if average else 1.0
    layers = {}
    for name, module in experts.items():
        holding = Holding(bank_of(module), Seats.of(planned.layer(index_of(name))), wire.rank)
        layers[name] = LayerExchange(holding, wire, made, stepping, cluster, share)
        told: Any = module
        told.mixtura_exchange = layers[name]
    told = model
    if hasattr(told, "set_experts_implementation"):
        told.set_experts_implementation(NAME)
    parallel = Parallel(model, wire, layers, planned)
    told._ddp_params_and_buffers_to_ignore = sorted(parallel.expert_names())
    return parallel


def index_of(name: str) -> int:
    """The decoder layer that an experts module belongs to, by its name.

    >>> index_of("model.layers.3.mlp.experts")
    3
    """
    found = _NUMBER.search(name)
    return int(found[1]) if found else 0


def sizes_of(module: nn.Module) -> tuple[int, int, int]:
    """D, F and E of a module that runs experts."""
    told: Any = module
    shape = getattr(told, "shape", None)
    if shape is not None:
        return shape.d_model, shape.d_expert, shape.num_experts
    first, second = told.down_proj.shape[1:]
    d_model, d_expert = (second, first) if told.is_transposed else (first, second)
    return d_model, d_expert, told.down_proj.shape[0]


def _group(mesh: Any) -> tuple[Any, int]:
    """The process group of a mesh, and how many of its processes are a node."""
    if not dist.is_initialized():
        raise UserError(
            "no process group is there; start the processes with torchrun, or call "
            "torch.distributed.init_process_group first"
        )
    if mesh is None:
        return None, dist.get_world_size()
    if mesh.ndim > 2:
        raise UserError(f"a mesh of experts has one dimension or two, nodes and devices, got {mesh.ndim}")
    every = mesh.mesh.flatten().tolist()
    if every != list(range(dist.get_world_size())):
        raise UserError(
            f"the mesh holds the processes {every}, but experts lie on all {dist.get_world_size()} in order; "
            "give a mesh of all, or none"
        )
    return None, mesh.size(mesh.ndim - 1)


def _cluster(wire: Wire) -> Cluster:
    return Cluster(
        num_nodes=wire.size // wire.devices_per_node,
        devices_per_node=wire.devices_per_node,
        flops_per_s=1e12,
        memory_num_bytes=1 << 60,
        within=_ANY_LINK,
        between=_ANY_LINK,
    )


def _planned(placer: Placer, sizes: Mapping[str, tuple[int, int, int]], cluster: Cluster) -> Placement:
    layers = {index_of(name): (index_of(name), *one, 1) for name, one in sizes.items()}
    return placer.plan(trace_of_sizes(list(layers.values())), cluster)


def _facts(model: nn.Module, planned: Placement, exchange: Exchange | str) -> dict[str, str]:
    """What all processes must have the same of."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(
            f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad}\n".encode()
        )
        digest.update(parameter.detach().flatten()[:64].double().numpy().tobytes())
    return {
        "mixtura version": __version__,
        "torch version": str(torch.__version__),
        "transformers version": transformers.__version__,
        "model": digest.hexdigest()[:16],
        "placement": hashlib.sha256(planned.to_json().encode()).hexdigest()[:16],
        "exchange": exchange if isinstance(exchange, str) else type(exchange).__name__,
    }


def _check(planned: Placement, sizes: Mapping[str, tuple[int, int, int]], wire: Wire) -> None:
    """Refuse a placement that is not for these processes or this model."""
    if planned.num_devices != wire.size:
        raise UserError(
            f"the placement is for {planned.num_devices} devices, but there are {wire.size} processes; "
            "start as many, or plan again"
        )
    for name, (_, _, num_experts) in sizes.items():
        at: LayerPlacement = planned.layer(index_of(name))
        if at.num_experts != num_experts:
            raise UserError(
                f"the placement has {at.num_experts} experts in layer {at.index}, the model {num_experts}; "
                "plan for this model"
            )
