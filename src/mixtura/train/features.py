"""What a training may ask for besides steps: a teacher, and leaving out steps whose loss leaps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite, sqrt
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import check_range

_IGNORED = -100


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A model whose distribution is learned besides the text's next tokens.

    Attributes:
        model: its directory; it must have the same vocabulary.
        coefficient: of its loss, ``temperature**2`` times the KL divergence from it.
        temperature: by which both models' logits are divided.
        until: the step before which it ends; null for never.
    """

    model: str
    coefficient: float = 1.0
    temperature: float = 1.0
    until: int | None = None

    def __post_init__(self) -> None:
        check_range("teacher", "coefficient", self.coefficient, 0, 1e6)
        check_range("teacher", "temperature", self.temperature, 1e-3, 1e3)
        if self.until is not None:
            check_range("teacher", "until", self.until, 1, 1 << 40)

    def teaches(self, step: int) -> bool:
        """Whether it still teaches after so many steps."""
        return self.until is None or step < self.until


def teaching_loss(
    student: Float[Tensor, "B Q V"],
    teacher: Float[Tensor, "B Q V"],
    labels: Int[Tensor, "B Q"],
    temperature: float,
    num_items: int | Tensor | None = None,
) -> Float[Tensor, ""]:
    """``temperature**2`` times KL(teacher || student), averaged over the predictions whose label counts.

    With ``num_items`` the sum is divided by that instead, so that the parts of a batch add up.

    >>> logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    >>> teaching_loss(logits, logits, torch.tensor([[0, 1]]), 2.0).item()
    0.0
    """
    counted = (labels != _IGNORED)[:, 1:]
    told, said = (one[:, :-1][counted].float() / temperature for one in (teacher, student))
    divergence = F.kl_div(said.log_softmax(-1), told.log_softmax(-1), reduction="sum", log_target=True)
    divisor = counted.sum() if num_items is None else torch.as_tensor(num_items, device=divergence.device)
    return temperature**2 * divergence / divisor.clamp(min=1)


@final
@dataclass(slots=True)
class SpikeGuard:
    """Says which steps' losses leap: more than so many deviations above the mean of recent steps.

    Steps that leap are not counted in the mean. After three of them in a row the next is taken: the loss has
    then risen for good. A loss that is not finite always leaps.

    Args:
        deviations: from which on a loss leaps; the deviation is at least a thousandth of the mean.
    """

    deviations: float
    mean: float = 0.0
    variance: float = 0.0
    num_seen: int = 0
    in_a_row: int = 0
    num_skipped: int = field(default=0)

    _WINDOW = 100
    _LEAST = 20
    _MOST_IN_A_ROW = 3

    def leaps(self, loss: float) -> bool:
        """Whether a step's loss leaps; the step is counted in any case."""
        spread = max(sqrt(self.variance), 1e-3 * abs(self.mean))
        high = self.num_seen >= self._LEAST and loss > self.mean + self.deviations * spread
        if not isfinite(loss) or (high and self.in_a_row < self._MOST_IN_A_ROW):
            self.in_a_row += 1
            self.num_skipped += 1
            return True
        self.in_a_row = 0
        self.num_seen += 1
        weight, apart = 1 / min(self.num_seen, self._WINDOW), loss - self.mean
        self.mean += weight * apart
        self.variance = (1 - weight) * (self.variance + weight * apart**2)
        return False

    def to_dict(self) -> dict[str, Any]:
        """Its state as JSON values."""
        return asdict(self)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name, value in state.items():
            setattr(self, name, value)
