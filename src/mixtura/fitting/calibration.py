"""What calibration text says of one expert: its inputs, what it makes of them, and their second moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.fitting.rounding import Seen
from mixtura.kernels import ExpertMath, ExpertTensors

# An expert's moments are added to so many rows of what the layer's tokens are like on average.
_PRIOR_ROWS = 64


@final
class Calibration(NamedTuple):
    """An expert's inputs, the weights of its outputs, these, and the moments of its matrices' inputs."""

    inputs: Float[Tensor, "n D"]
    weights: Float[Tensor, " n"]
    outputs: Float[Tensor, "n D"]
    up_moments: Float[Tensor, "D D"]
    down_moments: Float[Tensor, "F F"] | None

    def error(self, math: ExpertMath, changed: ExpertTensors) -> float:
        """Squared error of the weighted outputs where other matrices take the place of the expert's."""
        wide = changed.to(torch.float32)
        return self._weighed(math.outputs(math.hidden(self.inputs, wide), wide) - self.outputs)

    @property
    def whole(self) -> float:
        """Squares of the weighted outputs, added up."""
        return self._weighed(self.outputs)

    def _weighed(self, outputs: Float[Tensor, "n D"]) -> float:
        return float((self.weights.double().square() * outputs.square().sum(-1)).sum())


def calibrated(
    seen: Seen,
    average: Float[Tensor, "D D"],
    members: Sequence[int],
    tensors: ExpertTensors,
    math: ExpertMath,
) -> Calibration:
    """What a layer's tokens say of one of its experts.

    Args:
        seen: what the layer was given; choices below 0 are absent.
        average: ``seen.average``, which is the same for all experts.
        members: the numbers under which the router chooses this expert: several where it was merged.
        tensors: its matrices.
        math: what it computes around them.
    """
    rows = [seen.rows_of(member) for member in members]
    inputs, weights = (torch.cat(parts) for parts in zip(*rows, strict=True))
    wide = tensors.to(torch.float32)
    hidden = math.hidden(inputs, wide)
    scaled, own = inputs * weights[:, None], hidden * weights[:, None]
    return Calibration(
        inputs,
        weights,
        math.outputs(hidden, wide),
        scaled.T @ scaled + average * _PRIOR_ROWS,
        own.T @ own if len(own) else None,
    )
