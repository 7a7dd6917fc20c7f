"""Groups of equal size at the least total distance, exactly."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor


def balanced(distances: Float[Tensor, "N G"]) -> Int[Tensor, " N"]:
    """Which of G groups each of N members is in, N / G in each, so that the distances' sum is the least.

    What a linear assignment of members to N places gives (Jonker and Volgenant), in memory for N times G:
    members come one by one, and where a group is full the cheapest chain of members that move on makes room.

    >>> balanced(torch.tensor([[0.0, 9.0], [0.0, 1.0], [0.0, 5.0], [2.0, 3.0]])).tolist()
    [0, 1, 0, 1]
    """
    costs = distances.double().numpy()
    number, groups = costs.shape
    size = number // groups
    members: list[list[int]] = [[] for _ in range(groups)]
    # What it costs at least to move a member of a group to another, and which.
    prices = np.full((groups, groups), np.inf)
    movers = np.zeros((groups, groups), dtype=np.int64)
    for member in range(number):
        path, free = _cheapest(costs[member], prices, [len(held) < size for held in members])
        chain = [free]
        while path[chain[0]] >= 0:
            chain.insert(0, int(path[chain[0]]))
        moving = member
        for place, group in enumerate(chain):
            members[group].append(moving)
            if place + 1 < len(chain):
                moving = int(movers[group, chain[place + 1]])
                members[group].remove(moving)
        for group in chain:
            held = np.array(members[group])
            more = costs[held] - costs[held, group][:, None]
            movers[group], prices[group] = held[more.argmin(0)], more.min(0)
    found = torch.zeros(number, dtype=torch.long)
    for group, inside in enumerate(members):
        found[inside] = group
    return found


def _cheapest(costs: ndarray, prices: ndarray, room: list[bool]) -> tuple[ndarray, int]:
    """From which group each is best reached (-1: directly), and the group with room that costs least."""
    reached, path = costs.copy(), np.full(len(costs), -1)
    for _ in range(len(costs)):
        through = reached[:, None] + prices
        best = through.argmin(0)
        least = through[best, np.arange(len(costs))]
        better = least < reached - 1e-12
        if not better.any():
            break
        reached[better], path[better] = least[better], best[better]
    return path, int(np.where(room, reached, np.inf).argmin())
