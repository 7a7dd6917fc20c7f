"""Ranks of experts that grow: what an expert's matter, and who gets more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def importance_of(parts: Sequence[tuple[Tensor, Tensor]], ranks: Int[Tensor, " E"]) -> Float[Tensor, " E"]:
    """The mean of parameter times gradient, without its sign, over the ranks that each expert has.

    Args:
        parts: factors ``a [E, R, cols]`` and ``b [E, rows, R]``, zeros in the gradients of ranks beyond.
        ranks: of each expert.
    """
    total, count = parts[0][0].detach().new_zeros(len(ranks)), torch.zeros_like(ranks)
    for a, b in parts:
        for one in (a, b):
            if one.grad is not None:
                total = total + (one * one.grad).abs().detach().flatten(1).sum(1)
        count = count + ranks * (a.shape[2] + b.shape[1])
    return total / count.clamp(min=1)


def give(ranks: Int[Tensor, " E"], saliency: Float[Tensor, " E"], given: int, most: int) -> Int[Tensor, " E"]:
    """Ranks after so many more were given, one by one in the order of saliency, round by round.

    >>> give(torch.tensor([1, 1, 3]), torch.tensor([0.1, 0.5, 0.9]), 3, 3).tolist()
    [2, 3, 3]
    """
    grown = ranks.clone()
    order = torch.sort(saliency, descending=True, stable=True).indices
    while given > 0:
        able = order[grown[order] < most][:given]
        if not len(able):
            break
        grown[able] += 1
        given -= len(able)
    return grown


def growths_left(step: int, num_steps: int, interval: int, share: float) -> int:
    """The growths from a step on, its own included; 0 where it has none.

    They are ``interval`` steps apart in the first ``share`` of the steps; where that has fewer steps, there
    is one, at its end.

    >>> [growths_left(step, 4, 2, 1.0) for step in range(4)], growths_left(1, 4, 100, 0.5)
    ([0, 2, 0, 1], 1)
    """
    steps = max(int(num_steps * share), int(share > 0))
    apart = max(min(interval, steps), 1)
    turn, rest = divmod(step + 1, apart)
    return 0 if rest or turn > steps // apart else steps // apart - turn + 1
