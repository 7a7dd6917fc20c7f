"""What calibration text says of a layer's experts: their inputs, what they make of them, second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mixtura.kernels import ExpertMath, ExpertTensors
from mixtura.kernels.compiled import num_threads

# An expert's moments are added to so many rows of what the layer's tokens are like on average.
_PRIOR_ROWS = 64


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """The tokens that one MoE layer was given, and their experts and weights."""

    hidden: Float[Tensor, "T D"]
    index: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]

    def rows_of(self, expert: int) -> tuple[Float[Tensor, "n D"], Float[Tensor, " n"]]:
        """An expert's inputs, and the weights of its outputs."""
        tokens, places = (self.index == expert).nonzero(as_tuple=True)
        return self.hidden[tokens].float(), self.weights[tokens, places].float()

    @property
    def average(self) -> Float[Tensor, "D D"]:
        """Second moments of a token, weighed as one assignment is on average."""
        present = self.index >= 0
        hidden = self.hidden[present.any(-1)].float()
        weight = self.weights[present].float().square().mean() if bool(present.any()) else 0.0
        return hidden.T @ hidden * (weight / max(len(hidden), 1))


@final
class Calibration(NamedTuple):
    """An expert's inputs, the weights of its outputs, these, and the moments of its matrices' inputs."""

    inputs: Float[Tensor, "n D"]
    weights: Float[Tensor, " n"]
    outputs: Float[Tensor, "n D"]
    up_moments: Float[Tensor, "D D"] | None
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


def uncalibrated(d_model: int) -> Calibration:
    """What is said of an expert of a layer that no text reached."""
    nothing = torch.zeros(0, d_model)
    return Calibration(nothing, torch.zeros(0), nothing, None, None)


def side_by_side(work: Callable[[int], object], experts: Iterable[int]) -> None:
    """Do something for each of a layer's experts, on as many threads as there are.

    The work is in many small operators, each on one thread: so processors are used better.
    """
    waiting = list(experts)
    # PyTorch's own number may be held down while a model runs.
    threads, workers = torch.get_num_threads(), num_threads()
    try:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(min(workers, max(1, len(waiting)))) as pool:
            for _ in pool.map(work, waiting):
                pass
    finally:
        torch.set_num_threads(threads)
