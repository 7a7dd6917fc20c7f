"""Seg-MoE: a forecaster whose experts are given stretches of time instead of single steps."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods import create
from mixtura.methods.estimators import NetworkRegressor, Passed
from mixtura.methods.estimators._series import SegmentLayer
from mixtura.types import BalancerInput

METHOD = {
    "paper": 85,
    "title": (
        "Seg-MoE: Multi-Resolution Segment-wise Mixture-of-Experts for Time Series Forecasting Transformers"
    ),
    "tags": ["regresses", "forecasts", "tabular"],
}


@final
class SegMoe(NetworkRegressor):
    """Forecast a series by a transformer whose experts take whole segments, longer ones layer by layer.

    Time series, multi-step forecasting. Rows are windows of the past (``mixtura.estimators.windows``). In
    each layer steps attend to each other, then stand together in segments of ``segments[layer]`` steps; a
    router reads a segment whole and sends it to ``top_k`` experts, and a gated shared expert is added. What
    is forecast is the change from the last value.

    Shapes:
        ``X [n, L]``, ``y [n, H]`` or ``[n]``; ``route`` gives the last layer's segments, ``ceil(L / s)`` a
        row.

    Raises:
        SettingError: ``segments`` is empty or holds a number that is not in [1, 65536], ``top_k`` is not in
            [1, ``num_experts``], ``balance`` in [0, 1e6], ``d_model`` in [2, 4096], or another is out of
            range.
        UserError: a number is missing; of `windows`, the series is too short.

    Example:
        >>> import numpy as np
        >>> from mixtura.methods.estimators import windows
        >>> X, y = windows(np.sin(np.arange(220) / 5), past=16, future=4)
        >>> model = SegMoe(epochs=10).fit(X[:150], y[:150])
        >>> bool(model.score(X[150:], y[150:]) > 0.8), model.route(X[:2]).num_tokens
        (True, 4)

    Differences from the paper:
        One series at a time. Two layers, one attention head, learned positions; a plain linear head. In the
        released code routed experts read single steps of the segment; here the segment whole, as the abstract
        says. Adam in place of AdamW.

    Reference:
        Seg-MoE: Multi-Resolution Segment-wise Mixture-of-Experts for Time Series Forecasting Transformers
        (paper 85, abstract); evortigosa/segmoe_forecast.
    """

    ranges: ClassVar = {"top_k": (1, 4096), "balance": (0, 1e6), "d_model": (2, 4096)}

    def __init__(
        self,
        *,
        num_experts: int = 4,
        top_k: int = 1,
        segments: list[int] | None = None,
        d_model: int = 8,
        d_hidden: int = 32,
        balance: float = 0.02,
        epochs: int = 30,
        batch_size: int = 32,
        learning_rate: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.segments = segments
        self.d_model = d_model
        self.d_hidden = d_hidden
        self.balance = balance
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def build(self, d_in: int, d_out: int) -> nn.Module:
        sizes = [4, 8] if self.segments is None else self.segments
        if not sizes or not all(1 <= size <= 1 << 16 for size in sizes):
            raise SettingError(f"segments of SegMoe must be numbers in [1, 65536], got {self.segments!r}")
        return _Network(d_in, d_out, sizes, self)

    def loss(self, passed: Passed, target: Float[Tensor, "T O"], progress: float) -> Float[Tensor, ""]:
        even = create("balancers", "switch_loss", coefficient=self.balance)
        losses = [even.loss(BalancerInput(routing=one)) for one in passed.more]
        return F.mse_loss(passed.output, target) + torch.stack(losses).sum()


@final
class _Network(nn.Module):
    def __init__(self, d_in: int, d_out: int, sizes: list[int], owner: SegMoe) -> None:
        super().__init__()
        self.embed = nn.Linear(1, owner.d_model)
        self.positions = nn.Parameter(0.1 * torch.randn(d_in, owner.d_model))
        self.layers = nn.ModuleList(
            SegmentLayer(size, owner, seed) for seed, size in enumerate(sizes, owner.random_state)
        )
        self.head = nn.Linear(d_in * owner.d_model, d_out)

    def forward(self, x: Float[Tensor, "n L"]) -> Passed:
        level = x[:, -1:]
        h = self.embed((x - level)[..., None]) + self.positions
        routings = []
        for layer in self.layers:
            h, routing = layer(h)
            routings.append(routing)
        return Passed(output=level + self.head(h.flatten(1)), routing=routings[-1], more=routings)
