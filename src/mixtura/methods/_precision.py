"""Computing in float32 at least, whatever the model's dtype and also under autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

# Devices on which products may be rounded without their operands being so.
_AUTOCAST = ("cpu", "cuda", "xpu", "mps")


def exact(values: Tensor) -> Tensor:
    """The values in float32 at least: what methods compute in whatever the model's dtype."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@contextmanager
def full_precision() -> Iterator[None]:
    """A block, or as a decorator a function, whose products have the dtype of what is multiplied.

    Where autocast is on, it would round them to 16 bits.
    """
    with ExitStack() as left:
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                left.enter_context(torch.autocast(device, enabled=False))
        yield


@full_precision()
def plain_logits(x: Float[Tensor, "T D"], weight: Float[Tensor, "R D"]) -> Float[Tensor, "T R"]:
    """Every token's product with every row, in the wider dtype of both."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return F.linear(x.to(dtype), weight.to(dtype))


def exact_logits(x: Float[Tensor, "T D"], weight: Float[Tensor, "R D"]) -> Float[Tensor, "T R"]:
    """Every token's product with every row, in float32 at least."""
    return plain_logits(exact(x), exact(weight))
