"""Rows sent between processes, differentiably, and counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mixtura.errors import UserError
from mixtura.methods.exchanges import Hop

Back = Callable[[Tensor], Tensor]


@final
class Wire:
    """What connects the processes of a group: all of them, those of a node, those of one place in all nodes.

    Args:
        group: the process group; None for all processes.
        devices_per_node: how many of them are a node, in order.

    Attributes:
        sent: bytes of rows that this process sent to others, by what lies between (``within`` a node or
            ``between`` nodes); ``messages`` counts transfers to others that were not empty.
    """

    def __init__(self, group: Any, devices_per_node: int) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.devices_per_node = devices_per_node
        self.node, self.place = divmod(self.rank, devices_per_node)
        self.group = group
        self.sent: Counter[str] = Counter()
        members = dist.get_process_group_ranks(group) if group is not None else range(self.size)
        every = list(members)
        num_nodes = self.size // devices_per_node
        within = [every[n * devices_per_node : (n + 1) * devices_per_node] for n in range(num_nodes)]
        between = [every[place::devices_per_node] for place in range(devices_per_node)]
        # Every process has to make every group, in the same order.
        alone = num_nodes == 1 or devices_per_node == 1
        nodes, places = (
            [] if alone else [dist.new_group(one) for one in groups] for groups in (within, between)
        )
        self._groups: dict[Hop, Any] = {"all": group}
        if not alone:
            self._groups |= {"within": nodes[self.node], "between": places[self.place]}
        self._members: dict[Hop, list[int]] = {
            "all": list(range(self.size)),
            "within": [self.node * devices_per_node + place for place in range(devices_per_node)],
            "between": [node * devices_per_node + self.place for node in range(num_nodes)],
        }

    def useful(self, hops: Sequence[Hop]) -> tuple[Hop, ...]:
        """The hops, one to all where there is only one node or one device in each."""
        return tuple(hops) if "within" in self._groups else ("all",)

    def target(self, devices: Tensor, hop: Hop) -> Tensor:
        """Where, in a hop's group, rows for these devices go next."""
        if hop == "all":
            return devices
        if hop == "between":
            return torch.div(devices, self.devices_per_node, rounding_mode="floor")
        return devices % self.devices_per_node

    def hop(self, rows: Tensor, seats: Tensor, devices: Tensor, hop: Hop) -> tuple[Tensor, Tensor, Back]:
        """Send rows one hop towards their devices.

        Returns the rows that came here, their seats, and what sends outputs of them back to where they came
        from, in the order in which they were sent.
        """
        target = self.target(devices, hop)
        order = torch.argsort(target, stable=True)
        send = torch.bincount(target, minlength=len(self._members[hop]))
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=self._groups[hop])
        sizes, others = send.tolist(), receive.tolist()
        came = self.rows(rows[order], sizes, others, hop)
        came_seats = self.numbers(seats[order], sizes, others, hop)

        def back(outputs: Tensor) -> Tensor:
            returned = self.rows(outputs, others, sizes, hop)
            return torch.empty_like(returned).index_copy(0, order, returned)

        return came, came_seats, back

    def rows(self, rows: Tensor, send: list[int], receive: list[int], hop: Hop = "all") -> Tensor:
        """Rows to each member of a hop's group, differentiable on every process or on none."""
        # Autograd has to run the way back on a process that sent nothing, too.
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
        moved: Tensor = _Moved.apply(rows, anchor, send, receive, self, hop)  # type: ignore[no-untyped-call]
        return moved

    def numbers(self, values: Tensor, send: list[int], receive: list[int], hop: Hop = "all") -> Tensor:
        """Whole numbers that go with rows; they are not counted."""
        came = values.new_empty(sum(receive))
        dist.all_to_all_single(came, values.contiguous(), receive, send, group=self._groups[hop])
        return came

    def move(self, rows: Tensor, send: list[int], receive: list[int], hop: Hop) -> Tensor:
        """One all-to-all, counted; of bytes, since not every backend knows every kind of number."""
        came = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(
            came.view(torch.uint8),
            rows.contiguous().view(torch.uint8),
            receive,
            send,
            group=self._groups[hop],
        )
        size = rows[:1].numel() * rows.element_size() if len(rows) else 0
        for member, count in zip(self._members[hop], send, strict=True):
            if member != self.rank and count:
                side = "within" if member // self.devices_per_node == self.node else "between"
                self.sent[side] += count * size
                self.sent["messages"] += 1
        return came

    def gathered(self, values: Tensor) -> Tensor:
        """As many numbers of every process, one row each."""
        found = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(found, values.contiguous(), group=self.group)
        return torch.stack(found)

    def agree(self, facts: dict[str, str]) -> None:
        """Refuse to begin where processes do not agree on something, by its name.

        Raises:
            UserError: they do not; every process raises it.
        """
        said = json.dumps(facts, sort_keys=True).encode()
        sizes = self.gathered(torch.tensor([len(said)])).flatten()
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        every = self.gathered(padded)
        for rank in range(self.size):
            other = json.loads(bytes(every[rank, : sizes[rank]].tolist()))
            first = json.loads(bytes(every[0, : sizes[0]].tolist()))
            for name in sorted(first.keys() | other.keys()):
                if first.get(name) != other.get(name):
                    raise UserError(
                        f"processes 0 and {rank} do not have the same {name}: {first.get(name)} and "
                        f"{other.get(name)}; give all processes the same"
                    )


@final
class _Moved(Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, anchor: Tensor, send: list[int], receive: list[int], wire: Wire, hop: Hop
    ) -> Tensor:
        del anchor
        ctx.way = send, receive, wire, hop
        return wire.move(rows, send, receive, hop)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        send, receive, wire, hop = ctx.way
        return wire.move(grad, receive, send, hop), None, None, None, None, None
