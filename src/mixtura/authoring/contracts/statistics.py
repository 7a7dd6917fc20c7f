"""What every statistic promises."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.authoring.contracts._core import Subject, require
from mixtura.methods.statistics import Statistic

_SIZES = (12, 16)


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """An expert's inputs, outputs and routing weights."""
    del method
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = (torch.randn(_SIZES, generator=generator) for _ in range(2))
    return inputs, outputs, torch.rand(_SIZES[0], generator=generator)


def use(statistic: Statistic, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The number of each assignment."""
    return statistic.measure(*given)


def check_one_number_per_assignment(method: Subject) -> None:
    """One finite number for each assignment, and none for none."""
    statistic = method.create()
    numbers = use(statistic, sample(method, 10))
    require(numbers.shape == _SIZES[:1], "there must be one number per assignment")
    require(torch.isfinite(numbers).all(), "numbers must be finite")
    none = use(statistic, tuple(part[:0] for part in sample(method, 10)))  # type: ignore[arg-type]
    require(none.shape == (0,), "no assignments must give no numbers")


def check_assignments_are_independent(method: Subject) -> None:
    """An assignment's number does not depend on the others, so that any batch gives the same mean."""
    statistic = method.create()
    inputs, outputs, weights = sample(method, 11)
    whole = use(statistic, (inputs, outputs, weights))
    part = use(statistic, (inputs[3:7], outputs[3:7], weights[3:7]))
    require(torch.allclose(whole[3:7], part), "a part of the batch gives other numbers")


def check_low_precision(method: Subject) -> None:
    """Large half-precision rows give finite numbers near those of float32."""
    statistic = method.create()
    exact = tuple(1000 * part for part in sample(method, 12))
    expected = use(statistic, exact)  # type: ignore[arg-type]
    for dtype in (torch.bfloat16, torch.float16):
        found = use(statistic, tuple(part.to(dtype) for part in exact))  # type: ignore[arg-type]
        require(torch.isfinite(found).all(), f"numbers overflow in {dtype}")
        require(torch.allclose(found.float(), expected.float(), rtol=0.05), f"numbers are off in {dtype}")
