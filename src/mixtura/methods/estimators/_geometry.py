"""Curved spaces seen from one point: maps between the flat space at it and a ball or a sphere.

The ball of curvature ``-c`` has radius ``1 / sqrt(c)``; the sphere of curvature ``c`` lies in one dimension
more. Where a vector has no length, maps are what they tend to there, and so are gradients.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# How close to the ball's edge a point may come, where distances are infinite.
_EDGE = 1 - 1e-5


def length(x: Float[Tensor, "T D"]) -> Float[Tensor, "T 1"]:
    """The length of each row, at least a tiny number, so that a row of zeros has a gradient."""
    return x.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt()


def exp_ball(v: Float[Tensor, "T D"], c: float) -> Float[Tensor, "T D"]:
    """From the flat space at the ball's centre into the ball."""
    size = c**0.5 * length(v)
    return inside(torch.tanh(size) * v / size, c)


def log_ball(x: Float[Tensor, "T D"], c: float) -> Float[Tensor, "T D"]:
    """From the ball to the flat space at its centre."""
    size = (c**0.5 * length(x)).clamp(max=_EDGE)
    made: Tensor = torch.atanh(size) * x / size
    return made


def inside(x: Float[Tensor, "T D"], c: float) -> Float[Tensor, "T D"]:
    """Points drawn back into the ball where rounding put them on its edge."""
    most = _EDGE / c**0.5
    size = length(x)
    return torch.where(size > most, x / size * most, x)


def mobius_add(x: Float[Tensor, "T D"], y: Float[Tensor, "#T D"], c: float) -> Float[Tensor, "T D"]:
    """The sum of the ball's geometry; x + y as ``c`` goes to 0."""
    product = (x * y).sum(-1, keepdim=True)
    of_x, of_y = (one.square().sum(-1, keepdim=True) for one in (x, y))
    top = (1 + 2 * c * product + c * of_y) * x + (1 - c * of_x) * y
    return inside(top / (1 + 2 * c * product + c**2 * of_x * of_y).clamp(min=1e-12), c)


def exp_sphere(v: Float[Tensor, "T D"], c: float) -> Float[Tensor, "T N"]:
    """From the flat space at the pole onto the unit sphere, of one dimension more."""
    size = c**0.5 * length(v)
    return torch.cat([torch.cos(size), torch.sin(size) * v / length(v)], dim=-1)


def log_sphere(x: Float[Tensor, "T N"], c: float) -> Float[Tensor, "T D"]:
    """From the unit sphere to the flat space at its pole."""
    across = length(x[:, 1:])
    angle = torch.atan2(across, x[:, :1])
    made: Tensor = angle / c**0.5 * x[:, 1:] / across
    return made
