"""Splines and curves by formula; a straight line without bends; stages, and which values a step reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from mixtura.errors import SettingError
from mixtura.methods.estimators import windows
from mixtura.methods.estimators._kan import CELLS, ORDER, REACH, Curves, splines
from mixtura.methods.estimators.lesa import Lesa

X, Y = windows(np.sin(np.arange(220) / 5), past=8, future=6)


def test_splines_are_those_of_scipy_and_sum_to_one() -> None:
    step = 2 * REACH / CELLS
    knots = np.arange(-ORDER, CELLS + ORDER + 1) * step - REACH
    at = np.array([-2.9, -1.3, 0.0, 0.7, 2.99])
    found = splines(torch.from_numpy(at)).numpy()
    for place in range(CELLS + ORDER):
        basis = BSpline.basis_element(knots[place : place + ORDER + 2], extrapolate=False)
        assert found[:, place] == pytest.approx(np.nan_to_num(basis(at)))
    assert found.sum(1) == pytest.approx(1)
    assert not splines(torch.tensor([-9.0, 9.0])).any()


def test_curves_by_loops() -> None:
    layer = Curves(2, 3).double()
    x = torch.tensor([[0.3, -1.2], [2.0, 0.1]], dtype=torch.float64)
    made, bases = layer(x).detach(), splines(x)
    for row in range(2):
        for out in range(3):
            expected = 0.0
            for i in range(2):
                value = float(x[row, i])
                expected += float(layer.smooth[i, out].detach()) * value / (1 + math.exp(-value))
                expected += float(bases[row, i] @ layer.bends[i, :, out].detach())
            assert float(made[row, out]) == pytest.approx(expected)


def test_without_bends_values_go_straight_on() -> None:
    model = Lesa(epochs=1, closed_epochs=0).fit(X, Y)
    with torch.no_grad():
        for weight in model.module_.parameters():
            weight.zero_()
    rows = np.array([[0, 0, 0, 0, 0, 0, 1, 3], [5, 5, 5, 5, 5, 5, 2, 2]], float)
    expected = [[5, 7, 9, 11, 13, 15], [2] * 6]
    assert np.allclose(model.predict(rows), expected)


@pytest.mark.parametrize("is_closed", [True, False])
def test_steps_by_loops(is_closed: bool) -> None:
    model = Lesa(num_experts=2, reads=3, epochs=2, closed_epochs=1).fit(X, Y)
    x, known = torch.from_numpy(X[:3]), torch.from_numpy(Y[:3])
    with torch.no_grad():
        made = model.module_(x, None if is_closed else known)
        for row in range(3):
            values = x[row].tolist()
            for step in range(6):
                read = torch.tensor([[*values[-3:], (step + 1) / 6]], dtype=torch.float64)
                bend = model.module_.experts[0 if step < 3 else 1](read)
                said = 2 * values[-1] - values[-2] + float(bend)
                assert float(made[row, step]) == pytest.approx(said)
                values.append(said if is_closed else float(known[row, step]))


def test_stages_share_the_horizon_and_learn_apart() -> None:
    model = Lesa(num_experts=3, epochs=1, closed_epochs=0).fit(X, Y)
    assert model.module_.stages == [0, 0, 1, 1, 2, 2]
    routing = model.route(X[:5])
    assert routing.load.tolist() == [10, 10, 10]
    model.module_.zero_grad()
    model.module_(torch.from_numpy(X), torch.from_numpy(Y))[:, 2:4].sum().backward()
    moved = [any(w.grad is not None and w.grad.any() for w in e.parameters()) for e in model.module_.experts]
    assert moved == [False, True, False]


def test_learned_bends_are_better_than_the_line_and_the_last_value() -> None:
    series = np.sin(np.arange(400) / 4) + 0.3 * np.sin(np.arange(400) / 1.3)
    rows, future = windows(series, past=8, future=6)
    line = rows[300:, -1:] + np.arange(1, 7) * (rows[300:, -1:] - rows[300:, -2:-1])
    error = {"line": np.abs(line - future[300:]).mean()}
    error["last"] = np.abs(rows[300:, -1:] - future[300:]).mean()
    for epochs in (0, 20):
        model = Lesa(reads=8, closed_epochs=epochs).fit(rows[:290], future[:290])
        error[epochs] = np.abs(model.predict(rows[300:]) - future[300:]).mean()
    assert error[20] < 0.3 * min(error["line"], error["last"])
    # Learning on its own forecasts makes up for what they are off.
    assert error[20] < error[0]


def test_short_rows_and_settings() -> None:
    assert Lesa(reads=20, epochs=1).fit(X, Y[:, 0]).predict(X).shape == (len(X),)
    assert (
        Lesa(epochs=1).fit(X[:, :1].astype(np.float32), Y.astype(np.float32)).predict(X[:, :1]).shape
        == Y.shape
    )
    with pytest.raises(SettingError, match="reads of Lesa must be in"):
        Lesa(reads=0).fit(X, Y)
