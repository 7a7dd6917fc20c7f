"""Multi-Expert LDL: forecasts as distributions, the sum of trend, season, steps and noise by experts."""

from __future__ import annotations

from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.methods.estimators import NetworkRegressor, Passed, dense_routing, perceptron, seeded
from mixtura.methods.estimators._base import number_of
from mixtura.methods.estimators._series import kernel_score

METHOD = {
    "paper": 201,
    "title": (
        "Let Experts Feel Uncertainty: A Multi-Expert Label Distribution Approach to Probabilistic Time "
        "Series Forecasting"
    ),
    "tags": ["regresses", "forecasts", "generates", "tabular"],
}
_DEGREE = 2


@final
class MultiExpertLdl(NetworkRegressor):
    """Forecast what may come: experts for trend, season, change points and volatility add up to samples.

    Probabilistic forecasting, prediction intervals, label distribution learning. Rows are windows of the past
    (``mixtura.estimators.windows``). Each expert writes a path over the horizon in shapes of its own and how
    far it may be off; a softmax weighs the experts, and what they say adds up. It is trained so that samples
    are distributed as what came (maximum mean discrepancy), and by the squared error of their mean.

    Shapes:
        ``X [n, L]``, ``y [n, H]`` or ``[n]``; ``sample(X, num)`` gives ``[num, n, H]``; ``route`` gives the
        weights of trend, season, steps and volatility.

    Raises:
        SettingError: ``num_samples`` is not in [2, 4096], ``num_waves`` in [1, 256], ``squared`` in [0, 1e6],
            or a size, rate or ``random_state`` out of range.
        UserError: a number is missing; of `windows`, the series is too short.

    Example:
        >>> import numpy as np
        >>> from mixtura.methods.estimators import windows
        >>> noise = np.random.default_rng(0).normal(size=300)
        >>> X, y = windows(np.sin(np.arange(300) / 4) + 0.2 * noise, past=12, future=3)
        >>> drawn = MultiExpertLdl(epochs=15).fit(X, y).sample(X, 100)
        >>> inside = (np.quantile(drawn, 0.05, axis=0) < y) & (y < np.quantile(drawn, 0.95, axis=0))
        >>> drawn.shape, bool(0.8 < inside.mean() < 0.99)
        ((100, 286, 3), True)

    Differences from the paper:
        The abstract names experts that give distributions, the discrepancy and the four patterns; shapes are
        ours: a parabola, waves of one to ``num_waves`` turns over the horizon, steps at its quarters, and
        noise alone. 16 samples a row while learning, radial kernels of five widths, a tenth of the squared
        error.

    Reference:
        Let Experts Feel Uncertainty: A Multi-Expert Label Distribution Approach to Probabilistic Time Series
        Forecasting (paper 201, abstract).
    """

    ranges: ClassVar = {"num_samples": (2, 4096), "num_waves": (1, 256), "squared": (0, 1e6)}

    def __init__(
        self,
        *,
        num_samples: int = 16,
        num_waves: int = 3,
        squared: float = 0.1,
        d_hidden: int = 32,
        epochs: int = 40,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.num_samples = num_samples
        self.num_waves = num_waves
        self.squared = squared
        self.d_hidden = d_hidden
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def sample(self, X: Any, num: int = 100, seed: int = 0) -> np.ndarray:
        """So many futures of every row, in the units of the targets."""
        passed, num = self.run(X), number_of("sample", "num", num)
        with seeded(seed):
            noise = torch.randn(num, *passed.output.shape, dtype=passed.output.dtype)
        return self.unscaled(passed.output + passed.more * noise)

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return _Network(d_in, d_out, self.d_hidden, self.num_waves)

    def loss(self, passed: Passed, target: Float[Tensor, "T O"], progress: float) -> Float[Tensor, ""]:
        noise = torch.randn(self.num_samples, *target.shape, dtype=target.dtype)
        samples = (passed.output + passed.more * noise).transpose(0, 1)
        near = F.mse_loss(passed.output, target)
        return kernel_score(samples, target).mean() + self.squared * near


def shapes(num_steps: int, num_waves: int) -> tuple[Float[Tensor, "_ H"], ...]:
    """What experts write their paths in: powers, waves, steps; volatility has none."""
    time = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
    powers = torch.stack([time**degree for degree in range(_DEGREE + 1)])
    turns = 2 * torch.pi * torch.arange(1, num_waves + 1).double()[:, None] * time
    steps = (time > torch.arange(4)[:, None] / 4).double()
    return powers, torch.cat([turns.sin(), turns.cos()]), steps, torch.zeros(1, num_steps).double()


@final
class _Network(nn.Module):
    def __init__(self, d_in: int, d_out: int, width: int, num_waves: int) -> None:
        super().__init__()
        found = shapes(d_out, num_waves)
        for place, one in enumerate(found):
            self.register_buffer(f"shapes_{place}", one)
        self.features = nn.Sequential(perceptron(d_in, width, width), nn.ReLU())
        self.paths = nn.ModuleList(nn.Linear(width, len(one)) for one in found)
        self.spreads = nn.ModuleList(nn.Linear(width, d_out) for _ in found)
        self.gate = nn.Linear(width, len(found))

    def forward(self, x: Float[Tensor, "n L"]) -> Passed:
        level = x[:, -1:]
        h = self.features(x - level)
        logits = self.gate(h)
        weights = logits.softmax(-1)
        kept = [getattr(self, f"shapes_{place}") for place in range(len(self.paths))]
        outputs = torch.stack([path(h) @ shape for path, shape in zip(self.paths, kept, strict=True)])
        spreads = torch.stack([F.softplus(one(h)) for one in self.spreads])
        # Independent noises add up by their squares.
        spread = torch.einsum("te,eth->th", weights.square(), spreads.square()).clamp(min=1e-12).sqrt()
        output = level + torch.einsum("te,eth->th", weights, outputs)
        return Passed(output=output, routing=dense_routing(weights, logits), outputs=outputs, more=spread)
