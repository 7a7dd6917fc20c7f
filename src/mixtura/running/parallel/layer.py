"""One layer's experts on several processes: tokens go to them, they compute, outputs come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mixtura.kernels.routed import run_routed
from mixtura.methods._precision import exact
from mixtura.methods.exchanges import Exchange
from mixtura.methods.placements import Placer
from mixtura.running.parallel.holding import Holding
from mixtura.running.parallel.seats import Seats
from mixtura.running.parallel.wire import Wire
from mixtura.types.placement import Cluster


@final
class LayerExchange:
    """Runs a layer's experts wherever they are: an `ExpertExchange`.

    Args:
        holding: what this process owns of the experts.
        wire: to the other processes.
        exchange: how rows travel.
        placer: which copies a step gets; None for those of the placement.
        cluster: what the placer is told of devices.
        share: what gradients of experts are multiplied by.

    Attributes:
        loads: assignments by process and expert since the last step's end; they are the same on all
        processes. recent: those of the last steps, as many as the placer wants.
    """

    def __init__(
        self,
        holding: Holding,
        wire: Wire,
        exchange: Exchange,
        placer: Placer | None,
        cluster: Cluster,
        share: float,
    ) -> None:
        self.holding, self.wire, self.exchange = holding, wire, exchange
        self.placer, self.cluster, self.share = placer, cluster, share
        self.loads = torch.zeros(wire.size, holding.seats.at.num_experts, dtype=torch.float64)
        self.recent: list[Tensor] = []

    def __call__(
        self,
        x: Float[Tensor, "T D"],
        token_ids: Int[Tensor, " N"],
        expert_ids: Int[Tensor, " N"],
        weights: Float[Tensor, " N"],
    ) -> Float[Tensor, "T D"]:
        """Each token's weighted sum of its experts' outputs; an expert outside [0, E) is absent."""
        present = (expert_ids >= 0) & (expert_ids < self.holding.seats.at.num_experts)
        tokens, experts, factors = token_ids[present], expert_ids[present], weights[present]
        seats = self._seats(experts)
        taken = seats.taken(experts, self.wire.rank, self.wire.devices_per_node)
        parts = taken.shape[1]
        tokens = tokens.repeat_interleave(parts)
        packed = self.exchange.pack(x.index_select(0, tokens), taken.reshape(-1))
        outputs = packed.unpack(self._sent(packed.rows, packed.seats, seats))
        weighted = exact(outputs) * exact(factors).repeat_interleave(parts)[:, None]
        summed = weighted.new_zeros(x.shape).index_add(0, tokens, weighted)
        return summed.to(x.dtype)

    def end_step(self) -> None:
        """A step of training is over: what was counted becomes the past that copies are chosen by."""
        window = self.placer.window if self.placer is not None else 0
        if window:
            self.recent = [*self.recent, self.loads.clone()][-window:]
        self.loads.zero_()

    def _seats(self, experts: Tensor) -> Seats:
        """The seats of this step."""
        owned = self.holding.seats
        if self.placer is None:
            return owned
        counts = torch.bincount(experts, minlength=owned.at.num_experts)
        loads = self.wire.gathered(counts).double()
        self.loads += loads
        if self.placer.window:
            loads = sum(self.recent, torch.zeros_like(loads)) / max(len(self.recent), 1)
        num_bytes = sum(one[:1].numel() * one.element_size() for one in self.holding.parameters())
        at = self.placer.step(owned.at, loads, num_bytes, self.cluster)
        return owned if at == owned.at else Seats.of(at)

    def _sent(self, rows: Tensor, numbers: Tensor, seats: Seats) -> Tensor:
        """Rows sent to their seats, computed there and sent back."""
        backs = []
        for hop in self.wire.useful(self.exchange.hops()):
            rows, numbers, back = self.wire.hop(rows, numbers, seats.device[numbers], hop)
            backs.append(back)
        outputs = self._computed(rows, numbers, seats)
        for back in reversed(backs):
            outputs = back(outputs)
        return outputs

    def _computed(self, rows: Tensor, numbers: Tensor, seats: Seats) -> Tensor:
        """What this process's experts make of rows that came here."""
        here = seats.on(self.wire.rank)
        tensors = self._tensors(seats, here)
        if not len(rows):
            tied: Tensor = _Tied.apply(rows, *tensors)  # type: ignore[no-untyped-call]
            return tied
        local = torch.empty(len(seats.device), dtype=torch.int64).scatter(0, here, torch.arange(len(here)))
        held = [one for one in self.holding.parameters() if one.requires_grad]
        order = torch.arange(len(rows))
        ones = torch.ones_like(order, dtype=rows.dtype)
        store, math = self.holding.store(tensors), self.holding.math()
        return run_routed(rows, order, local[numbers], ones, store, math, None, held)

    def _tensors(self, seats: Seats, here: Tensor) -> list[Tensor]:
        """The tensors of the experts that sit here: those that lie here, and copies that are sent for."""
        own = [scaled(one, self.share) for one in self.holding.parameters()]
        copied = (~seats.owned).nonzero()[:, 0]
        if not len(copied):
            return own
        return [self._with_copies(one, seats, here, copied) for one in own]

    def _with_copies(self, own: Tensor, seats: Seats, here: Tensor, copied: Tensor) -> Tensor:
        wire, at = self.wire, seats.at
        # Owned seats are in the order of this process's parameters whatever copies a step has.
        keys = seats.expert * at.parts + seats.part
        held = {int(keys[seat]): place for place, seat in enumerate(here[seats.owned[here]])}
        leaving = [[held[int(keys[s])] for s in copied if seats.source[s] == wire.rank and seats.device[s] ==
        d]
                   for d in range(wire.size)]  # fmt: skip
        coming = [int(((seats.source == d) & (seats.device == wire.rank) & ~seats.owned).sum())
                  for d in range(wire.size)]  # fmt: skip
        chosen = torch.tensor([place for places in leaving for place in places], dtype=torch.int64)
        shape = own.shape[1:]
        sizes = [len(places) for places in leaving]
        send = own.flatten(1) if own.dim() > 1 else own[:, None]
        rows = wire.move(send.detach()[chosen], sizes, coming, "all") if not own.requires_grad else wire.rows(
            send[chosen], sizes, coming
        )  # fmt: skip
        mine = here[~seats.owned[here]]
        # Copies come source by source, and by seat within a source.
        arrival = mine[torch.argsort(seats.source[mine], stable=True)]
        places = {int(seat): len(own) + place for place, seat in enumerate(arrival)}
        both = torch.cat([own, rows.unflatten(1, shape)])
        return both[torch.tensor([places.get(int(s), held.get(int(keys[s]), 0)) for s in here])]


def summed_square(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of squares of gradients, in double precision."""
    return sum((one.double().square().sum() for one in gradients), torch.zeros((), dtype=torch.float64))


def scaled(parameter: Tensor, share: float) -> Tensor:
    """A parameter whose gradient is multiplied by a factor."""
    made: Tensor = _Scaled.apply(parameter, share)  # type: ignore[no-untyped-call]
    return made


@final
class _Scaled(Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, share: float) -> Tensor:
        ctx.share = share
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.share, None


@final
class _Tied(Function):
    """No rows at all, computed by experts: so that these get a gradient, of zeros, on every process."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *tensors: Tensor) -> Tensor:
        ctx.like = tensors
        return rows.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (torch.zeros_like(one) if needed else None
                 for one, needed in zip(ctx.like, ctx.needs_input_grad[1:], strict=True))  # fmt: skip
        return (grad, *zeros)
