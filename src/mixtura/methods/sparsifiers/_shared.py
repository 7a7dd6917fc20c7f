"""How many weights are left when, and which are largest: shared by sparsifiers."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods.sparsifiers import Masks, Sparsifier, Training


class Gradual(Sparsifier, ABC):
    """Fewer weights from time to time, by a cubic schedule; what is left is largest over all matrices."""

    def __init__(
        self, *, density: float, initial_density: float, begin: float, end: float, every: int
    ) -> None:
        self.density = self.within("density", density, 0.0, 1.0)
        self.initial_density = self.within("initial_density", initial_density, 0.0, 1.0)
        self.begin, self.end = self.within("begin", begin, 0.0, 1.0), self.within("end", end, 0.0, 1.0)
        self.every = self.within("every", every, 1, 1 << 40)
        for larger, smaller in (("initial_density", "density"), ("end", "begin")):
            if getattr(self, larger) < getattr(self, smaller):
                raise SettingError(
                    f"{larger} of {type(self).__name__} must not be below {smaller}, got "
                    f"{getattr(self, larger):g} and {getattr(self, smaller):g}"
                )
        if density == 0:
            raise SettingError(f"density of {type(self).__name__} must be above 0, or nothing is left")

    def last(self, num_steps: int) -> int:
        """The step after which as few weights are left as there ever are."""
        return min(max(1, math.ceil(self.end * num_steps)), max(1, num_steps - 1))

    def due(self, step: int, num_steps: int) -> bool:
        last = self.last(num_steps)
        in_turn = step % self.every == 0 and max(1.0, self.begin * num_steps) <= step <= last
        return step < max(num_steps, 2) and (in_turn or step == last)

    def density_at(self, step: int, num_steps: int) -> float:
        """The share of weights that is left after so many steps."""
        first, last = self.begin * num_steps, self.last(num_steps)
        if step >= last:
            return self.density
        gone = max(0.0, (step - first) / (last - first))
        return self.density + (self.initial_density - self.density) * (1 - gone) ** 3

    def fewer(self, training: Training) -> Masks:
        """The largest of the weights that are left, over all matrices, as many as there are to be."""
        total = sum(weight.numel() for weight in training.weights.values())
        share = self.density_at(training.step, training.num_steps)
        left = sum(int(mask.sum()) for mask in training.masks.values())
        # Weights that are gone come after all others.
        sizes = {
            name: torch.where(training.masks[name], weight.abs(), -1.0)
            for name, weight in training.weights.items()
        }
        return largest(sizes, min(left, max(1, round(share * total))))


def largest(values: Mapping[str, Float[Tensor, "..."]], count: int) -> Masks:
    """True for the ``count`` largest of all values; of equals those that come first."""
    flat = torch.cat([value.detach().flatten().float() for value in values.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.sort(descending=True, stable=True).indices[:count]] = True
    parts = chosen.split([value.numel() for value in values.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(values.items(), parts, strict=True)}


@final
class ErdosRenyi:
    """Sparse matrices drawn at random: the share that is there falls as a matrix grows (ERK).

    A matrix of R rows and C columns has ``(R + C) / (R * C)`` times a common factor, at most all.
    """

    @staticmethod
    def shares(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
        """The share of each matrix, such that ``density`` of all weights are there."""
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
        whole: set[str] = set()
        while True:
            rest = [name for name in shapes if name not in whole]
            wanted = density * sum(sizes.values()) - sum(sizes[name] for name in whole)
            factor = wanted / sum(raw[name] * sizes[name] for name in rest) if rest else 0.0
            full = [name for name in rest if factor * raw[name] > 1]
            if not full:
                return {name: 1.0 if name in whole else factor * raw[name] for name in shapes}
            whole.update(full)

    @staticmethod
    def masks(weights: Mapping[str, Float[Tensor, "..."]], density: float, seed: int) -> Masks:
        """Drawn weight by weight with those shares."""
        generator = torch.Generator().manual_seed(seed)
        shares = ErdosRenyi.shares({name: tuple(one.shape[-2:]) for name, one in weights.items()}, density)
        return {
            name: (torch.rand(one.shape, generator=generator) < shares[name]).to(one.device)
            for name, one in weights.items()
        }
