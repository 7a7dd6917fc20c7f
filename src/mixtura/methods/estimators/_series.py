"""Series as tables: windows of the past beside what came next, and the parts that forecasters share."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mixtura.errors import UserError
from mixtura.methods.estimators._networks import perceptron, routed, router, told
from mixtura.types import Routing


def windows(series: Any, past: int, future: int) -> tuple[np.ndarray, np.ndarray]:
    """Every stretch of a series as a row of its ``past`` values, oldest first, and the ``future`` after it.

    >>> X, y = windows([1, 2, 3, 4, 5], past=3, future=1)
    >>> X.tolist(), y.tolist()
    ([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]], [[4.0], [5.0]])

    Raises:
        UserError: the series is no row of finite numbers, or shorter than one stretch.
    """
    try:
        values = np.asarray(series, dtype=np.float64)
    except (ValueError, TypeError):
        raise UserError("a series is one row of finite numbers, got something that is no number") from None
    if values.ndim != 1 or not np.isfinite(values).all():
        raise UserError(
            f"a series is one row of finite numbers, got an array of shape {values.shape}"
            + ("" if np.isfinite(values).all() else " with gaps; fill them first")
        )
    if past < 1 or future < 1 or len(values) < past + future:
        raise UserError(
            f"a series of {len(values)} values is too short for {past} of the past and {future} of the "
            f"future; "
            f"give {past + future} or more"
        )
    cut = np.lib.stride_tricks.sliding_window_view(values, past + future)
    return cut[:, :past].copy(), cut[:, past:].copy()


def segmented(x: Float[Tensor, "n L D"], size: int) -> tuple[Float[Tensor, "n S R"], Bool[Tensor, "1 P 1"]]:
    """Steps in flattened segments of a size, the last filled up with zeros; and a mask of real steps."""
    num_rows, num_steps, width = x.shape
    missing = -num_steps % size
    padded = nn.functional.pad(x, (0, 0, 0, missing))
    real = torch.arange(num_steps + missing) < num_steps
    return padded.reshape(num_rows, -1, size * width), real[None, :, None]


def kernel_score(samples: Float[Tensor, "n S H"], target: Float[Tensor, "n H"]) -> Float[Tensor, " n"]:
    """The squared maximum mean discrepancy between a row's samples and what came, of radial kernels.

    Five bandwidths around the median distance of the minibatch's samples, which has no gradient. Samples are
    told apart, so that the mean over pairs leaves a sample's distance to itself out.
    """
    num = samples.shape[1]
    apart = _squares(samples[:, :, None], samples[:, None])
    near = _squares(samples, target[:, None])
    middle = apart.detach()[:, ~torch.eye(num, dtype=torch.bool)].median().clamp(min=1e-12)
    score = samples.new_zeros(len(samples))
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        within = (torch.exp(-apart / (factor * middle)).sum((1, 2)) - num) / (num * (num - 1))
        score = score + within - 2 * torch.exp(-near / (factor * middle)).mean(1) + 1
    return score / 5


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(-1)


@final
class SegmentLayer(nn.Module):
    """Attention over steps, then experts of whole segments of them."""

    def __init__(self, size: int, owner: Any, seed: int) -> None:
        super().__init__()
        width = size * owner.d_model
        self.size = size
        self.norms = nn.ModuleList(nn.LayerNorm(owner.d_model) for _ in range(2))
        self.attention = nn.MultiheadAttention(owner.d_model, 1, batch_first=True)
        self.gate = router("top_k", width, owner.num_experts, seed, top_k=owner.top_k)
        sizes = (width, owner.d_hidden, width)
        self.experts = nn.ModuleList(perceptron(*sizes) for _ in range(owner.num_experts))
        self.shared, self.shared_gate = perceptron(*sizes), nn.Linear(width, 1)

    def forward(self, h: Float[Tensor, "n L D"]) -> tuple[Tensor, Routing]:
        """The steps after the layer, and the routing of segments."""
        x = self.norms[0](h)
        h = h + self.attention(x, x, x, need_weights=False)[0]
        parts, real = segmented(self.norms[1](h), self.size)
        rows = parts.flatten(0, 1)
        routing = self.gate(told(rows, self.training))
        made = routed(self.experts, rows, routing, rows.shape[1])
        made = made + self.shared_gate(rows).sigmoid() * self.shared(rows)
        steps = made.reshape(len(h), -1, h.shape[2]) * real
        return h + steps[:, : h.shape[1]], routing
