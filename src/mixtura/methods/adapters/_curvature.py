"""What continual learning keeps of a layer: directions of its inputs, and what parameters matter."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn


def principal(
    moment: Float[Tensor, "C C"], most: int, energy: float
) -> tuple[Float[Tensor, "C U"], Float[Tensor, " U"]]:
    """The directions of greatest second moment, as columns, and their sizes; zeros where there are fewer.

    The fewest whose sizes have the share ``energy`` of all are kept, and ``most`` at most.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.flip(0)[:most].clamp(min=0), vectors.flip(1)[:, :most]
    whole = moment.double().trace().clamp(min=1e-300)
    before = (values.cumsum(0) - values) / whole
    kept = (before < energy) & (values > 0)
    return (vectors * kept).to(moment), (values * kept).to(moment)


def evened(
    grad: Float[Tensor, "R C"], axes: Float[Tensor, "C U"], sizes: Float[Tensor, " U"]
) -> Float[Tensor, "R C"]:
    """A gradient scaled along each direction by the inverse of its size over the mean, within [0.8, 1.2]."""
    used = sizes > 0
    mean = sizes.sum() / used.sum().clamp(min=1)
    factors = torch.where(used, (mean / sizes.clamp(min=1e-30)).clamp(0.8, 1.2), 1.0)
    return grad + (grad @ axes * (factors - 1).to(grad)) @ axes.T.to(grad)


def held_back(
    grad: Float[Tensor, "R C"], axes: Float[Tensor, "C U"], sizes: Float[Tensor, " U"], damping: float
) -> Float[Tensor, "R C"]:
    """A gradient over size plus damping along each direction, and over the damping across all of them."""
    along = grad @ axes
    return (grad - along @ axes.T) / damping + (along / (sizes + damping)) @ axes.T


def matters(parameters: list[Tensor]) -> Tensor:
    """The sum over parameters of the mean of value times gradient, without its sign; 0 without gradients."""
    given = [(one * one.grad).abs().mean().detach() for one in parameters if one.grad is not None]
    return torch.stack(given).sum() if given else parameters[0].detach().new_zeros(())


@final
class Directions(nn.Module):
    """The directions that a layer's inputs have: of the task at hand, and of all that are over."""

    moment: Tensor
    axes: Tensor
    sizes: Tensor
    past_axes: Tensor
    past_sizes: Tensor

    def __init__(self, cols: int, most: int, energy: float) -> None:
        super().__init__()
        self.energy = energy
        self.register_buffer("moment", torch.zeros(cols, cols))
        for name in ("", "past_"):
            self.register_buffer(f"{name}axes", torch.zeros(cols, most))
            self.register_buffer(f"{name}sizes", torch.zeros(most))

    def see(self, moment: Tensor | None, num_tokens: int) -> None:
        """Take in the inputs of one more step."""
        if moment is not None and num_tokens:
            self.moment += moment.to(self.moment) / num_tokens

    def refresh(self, num_steps: int) -> None:
        """Find the directions of what was seen in so many steps."""
        found = principal(self.moment / num_steps, len(self.sizes), self.energy)
        self.axes.copy_(found[0])
        self.sizes.copy_(found[1])

    def close(self) -> None:
        """The task is over: its directions are among those of the past from now on."""
        past = self.past_axes * self.past_sizes @ self.past_axes.T
        found = principal(past + self.axes * self.sizes @ self.axes.T, len(self.sizes), 1.0)
        self.past_axes.copy_(found[0])
        self.past_sizes.copy_(found[1])
        for passing in (self.moment, self.axes, self.sizes):
            passing.zero_()


@final
class Standing(nn.Module):
    """How much experts are used and how much they matter, as averages that move slowly."""

    use: Tensor
    importance: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        for name in ("use", "importance"):
            self.register_buffer(name, torch.zeros(num_experts))

    def see(self, loads: Tensor | None, num_tokens: int, found: list[Tensor]) -> None:
        """Take in what one more step says."""
        if loads is not None and num_tokens:
            self.use.lerp_(loads.to(self.use) / num_tokens, 0.05)
        self.importance.lerp_(torch.stack(found).to(self.importance), 0.05)

    def behind(self, margin: float) -> list[int]:
        """The experts whose use, from least to most, is not so much above what they matter, the same way."""
        apart = _evenly(self.use) - _evenly(self.importance)
        return (apart < margin).nonzero()[:, 0].tolist()

    def close(self) -> None:
        """Begin anew."""
        self.use.zero_()
        self.importance.zero_()


def _evenly(values: Tensor) -> Tensor:
    """From 0 for the least to 1 for the most."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=1e-12)
