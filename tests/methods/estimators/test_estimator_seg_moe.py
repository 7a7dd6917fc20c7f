"""Segments and their experts against loops; windows of a series, and series that are too short."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators import windows
from mixtura.methods.estimators._series import segmented
from mixtura.methods.estimators.seg_moe import SegMoe

WAVE = np.sin(np.arange(90) / 4)


def test_windows_are_the_past_beside_the_future() -> None:
    X, y = windows(WAVE, past=7, future=2)
    for place in range(len(X)):
        assert X[place].tolist() == WAVE[place : place + 7].tolist()
        assert y[place].tolist() == WAVE[place + 7 : place + 9].tolist()
    assert place + 9 == len(WAVE)


@pytest.mark.parametrize(
    ("series", "why"),
    [
        (WAVE[:8], "too short for 7 of the past and 2 of the future; give 9 or more"),
        (np.where(WAVE > 0.99, np.nan, WAVE), "with gaps; fill them first"),
        (WAVE.reshape(2, -1), "a series is one row of finite numbers"),
    ],
)
def test_bad_series_are_refused(series: np.ndarray, why: str) -> None:
    with pytest.raises(UserError, match=why):
        windows(series, past=7, future=2)


def test_segments_hold_their_steps_and_zeros() -> None:
    steps = torch.arange(10.0).reshape(1, 5, 2)
    parts, real = segmented(steps, 3)
    assert parts[0].tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 0, 0]]
    assert real[0, :, 0].tolist() == [True] * 5 + [False]


def test_a_layer_by_loops() -> None:
    X, y = windows(WAVE, past=10, future=2)
    model = SegMoe(segments=[4], num_experts=3, top_k=2, epochs=2).fit(X, y)
    layer = model.module_.layers[0]
    h = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made, routing = layer(h)
    x = layer.norms[0](h)
    q, k, v = (x @ layer.attention.in_proj_weight.T + layer.attention.in_proj_bias).chunk(3, -1)
    attended = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, -1) @ v
    after = h + layer.attention.out_proj(attended)
    read = layer.norms[1](after)
    for row in range(2):
        for number, start in enumerate((0, 4, 8)):
            segment = torch.zeros(4, 8, dtype=torch.float64)
            segment[: min(4, 10 - start)] = read[row, start : start + 4]
            flat = segment.reshape(-1)
            shares = torch.softmax(layer.gate.weight.double() @ flat, 0)
            best = shares.topk(2)
            out = layer.shared_gate(flat).sigmoid() * layer.shared(flat)
            for share, expert in zip(best.values / best.values.sum(), best.indices, strict=True):
                out = out + share * layer.experts[int(expert)](flat)
            expected = after[row, start : start + 4] + out.reshape(4, 8)[: min(4, 10 - start)]
            assert torch.allclose(made[row, start : start + 4], expected, atol=1e-6)
            assert (routing.token_ids == row * 3 + number).sum() == 2


def test_what_is_forecast_is_a_change_from_the_last_value() -> None:
    X, y = windows(WAVE, past=6, future=1)
    model = SegMoe(epochs=1).fit(X, y)
    with torch.no_grad():
        model.module_.head.weight.zero_()
        model.module_.head.bias.zero_()
    expected = (X[:, -1] - X[:, -1].mean()) / X[:, -1].std() * y.std() + y.mean()
    assert np.allclose(model.predict(X)[:, 0], expected)


def test_impossible_segments_are_refused() -> None:
    with pytest.raises(SettingError, match="segments of SegMoe"):
        SegMoe(segments=[]).fit(*windows(WAVE, past=6, future=1))
