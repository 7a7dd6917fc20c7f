"""The seats of a layer's experts on devices, and which of them each assignment takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from mixtura.types.placement import LayerPlacement


@final
@dataclass(frozen=True, slots=True)
class Seats:
    """Every expert, or part of one, on every device that runs it. The letter G counts groups of an expert.

    Attributes:
        expert, part, device: of each seat, ordered by device, expert and part.
        owned: whether the seat's numbers lie on its device.
        source: the device that they lie on.
        by_group: by expert, group and part, the number of the seat; -1 where there are fewer groups.
        shares: by expert and group.
        at: what this is made of.
    """

    expert: Int[Tensor, " S"]
    part: Int[Tensor, " S"]
    device: Int[Tensor, " S"]
    owned: Tensor
    source: Int[Tensor, " S"]
    by_group: Int[Tensor, "E G P"]
    shares: Tensor
    at: LayerPlacement

    @staticmethod
    def of(at: LayerPlacement) -> Seats:
        """The seats of a layer."""
        every = sorted(
            (device, expert, place % at.parts, place // at.parts)
            for expert, held in enumerate(at.devices)
            for place, device in enumerate(held)
        )
        most = max(len(held) for held in at.devices) // at.parts
        by_group = torch.full((at.num_experts, most, at.parts), -1)
        for number, (_, expert, part, group) in enumerate(every):
            by_group[expert, group, part] = number
        shares = torch.zeros(at.num_experts, most, dtype=torch.float64)
        for expert in range(at.num_experts):
            one = torch.tensor(at.shares_of(expert), dtype=torch.float64)
            shares[expert, : len(one)] = one
        device, expert, part, group = torch.tensor(every).T
        return Seats(
            expert=expert,
            part=part,
            device=device,
            owned=group == 0,
            source=torch.tensor([at.devices[e][p] for _, e, p, _ in every]),
            by_group=by_group,
            shares=shares,
            at=at,
        )

    def on(self, device: int) -> Tensor:
        """The numbers of a device's seats."""
        return (self.device == device).nonzero()[:, 0]

    def taken(self, experts: Int[Tensor, " N"], source: int, devices_per_node: int) -> Int[Tensor, "N P"]:
        """The seats, one for each part, that a device's assignments take.

        Those of one expert are dealt to its groups in the order they come, by shares, so that a step computed
        again deals them in the same way.
        """
        if self.by_group.shape[1] == 1:
            return self.by_group[experts, 0]
        shares = self._near(source, devices_per_node) if self.at.near else self.shares
        order = torch.argsort(experts, stable=True)
        counts = torch.bincount(experts, minlength=len(shares))
        first = counts.cumsum(0) - counts
        place = torch.empty_like(order)
        place[order] = torch.arange(len(experts)) - first[experts[order]]
        reached = (place + 0.5) / counts[experts]
        edges = shares.cumsum(1)
        edges[:, -1] = 1.0
        # Sums of shares may end a little below or above 1; a group without a share is passed over.
        group = (reached[:, None] > edges[experts] + 1e-12).sum(1)
        return self.by_group[experts, group]

    def _near(self, source: int, devices_per_node: int) -> Tensor:
        devices = torch.where(self.by_group >= 0, self.device[self.by_group.clamp(min=0)], -1)
        node = torch.where(devices >= 0, torch.div(devices, devices_per_node, rounding_mode="floor"), -1)
        shares = self.shares
        for near in ((node == source // devices_per_node).any(2), (devices == source).any(2)):
            known = near.sum(1, keepdim=True)
            shares = torch.where(known > 0, near / known.clamp(min=1), shares)
        return shares
