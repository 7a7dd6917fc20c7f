"""Parameters and noise drawn from a seed or a generator, never from a global one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mixtura.types import LayerShape


def generator_of(seed: int) -> torch.Generator:
    """A generator of a seed, which may be any whole number."""
    known = -(1 << 63) <= seed < 1 << 64
    return torch.Generator().manual_seed(seed if known else seed % (1 << 64))


def without_memory() -> bool:
    """Whether modules are being made on the device "meta", where nothing is to be drawn."""
    return torch.empty(0).is_meta


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers from a generator; on the device "meta" a tensor without numbers."""
    if without_memory():
        return torch.empty(shape)
    return torch.randn(shape, generator=generator, device=generator.device)


def drawn(seed: int, *shape: int, scale: float = 1.0) -> nn.Parameter:
    """A parameter from a normal distribution of variance ``scale`` over its last size."""
    return nn.Parameter(normal(generator_of(seed), *shape) * math.sqrt(scale / shape[-1]))


def router_weight(shape: LayerShape, seed: int, scale: float = 1.0) -> nn.Parameter:
    """Router rows ``[E, D]`` drawn from a normal distribution of variance ``scale / D``."""
    return drawn(seed, shape.num_experts, shape.d_model, scale=scale)


def orthogonal(num_rows: int, width: int, seed: int, gain: float = 0.1) -> nn.Parameter:
    """Rows of length ``gain`` at right angles, as far as ``width`` allows, turned at random."""
    if without_memory():
        return nn.Parameter(torch.empty(num_rows, width))
    generator = generator_of(seed)
    rows = torch.empty(num_rows, width, device=generator.device)
    return nn.Parameter(nn.init.orthogonal_(rows, gain=gain, generator=generator))


def normal_like(values: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of a tensor's shape and dtype, from a generator on any device."""
    return torch.randn(values.shape, generator=generator, device=generator.device).to(values)


def uniform_like(values: Tensor, generator: torch.Generator) -> Tensor:
    """Noise in [0, 1) of a tensor's shape and dtype, from a generator on any device."""
    return torch.rand(values.shape, generator=generator, device=generator.device).to(values)


def gumbel_like(values: Tensor, generator: torch.Generator) -> Tensor:
    """Gumbel noise of a tensor's shape and dtype, from a generator on any device."""
    tiny = torch.finfo(torch.float32).tiny
    drawn_values = torch.rand(values.shape, generator=generator, device=generator.device).clamp(min=tiny)
    # The largest float32 below 1 keeps the outer logarithm finite.
    return (-torch.log(-torch.log(drawn_values.clamp(max=1 - 2**-24)))).to(values)
