"""Patches that experts take, against loops; all patches at equal weights are a convolutional network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from mixtura.errors import SettingError
from mixtura.methods.estimators.patch_moe import PatchMoe, cut

X, Y = load_digits(n_class=3, return_X_y=True)


def test_patches_are_squares_row_by_row_with_zeros_at_the_edge() -> None:
    image = torch.arange(15.0).reshape(1, 3, 5)
    parts = cut(image, 2, 2)
    assert parts.shape == (1, 6, 4)
    assert parts[0, 0].tolist() == [0, 1, 5, 6]
    assert parts[0, 2].tolist() == [4, 0, 9, 0]
    assert parts[0, 5].tolist() == [14, 0, 0, 0]


def test_the_output_by_loops() -> None:
    model = PatchMoe(grid=[8, 8], side=4, patches=2, num_experts=3, epochs=2).fit(X[:100], Y[:100])
    net, passed = model.module_, model.run(X[:5])
    images = model.standardised(X[:5]).reshape(5, 8, 8)
    for row in range(5):
        found = []
        squares = [images[row, r : r + 4, c : c + 4].reshape(-1) for r in (0, 4) for c in (0, 4)]
        for expert in range(3):
            scores = torch.stack([net.gate.weight[expert].double() @ square for square in squares])
            best = sorted(range(4), key=lambda place: -float(scores[place]))[:2]
            shares = torch.softmax(scores[best], 0)
            total = torch.zeros(8, dtype=torch.float64)
            for share, place in zip(shares, best, strict=True):
                total += share * torch.relu(net.filters[expert] @ squares[place])
            found.append(total)
        expected = torch.cat(found) @ net.read / 24**0.5
        assert torch.allclose(passed.output[row], expected, atol=1e-6)


def test_taking_all_with_equal_weights_is_a_convolutional_network() -> None:
    model = PatchMoe(grid=[8, 8], side=4, patches=4, num_experts=1, num_filters=5, epochs=1)
    model.fit(X[:60], Y[:60])
    with torch.no_grad():
        model.module_.gate.weight.zero_()
    images = model.standardised(X[:60]).reshape(-1, 1, 8, 8)
    filters = model.module_.filters[0].reshape(5, 1, 4, 4)
    pooled = torch.nn.functional.conv2d(images, filters, stride=4).relu().mean((2, 3))
    expected = pooled @ model.module_.read / 5**0.5
    assert torch.allclose(model.output(X[:60]), expected)


def test_fixed_numbers_stay_fixed() -> None:
    first = PatchMoe(epochs=1, learning_rate=0.0).fit(X[:50], Y[:50]).module_.read
    later = PatchMoe(epochs=3).fit(X[:50], Y[:50]).module_.read
    assert torch.equal(first, later)


def test_a_grid_of_another_width_is_refused() -> None:
    with pytest.raises(SettingError, match="two numbers of product 64, got \\[8, 9\\]"):
        PatchMoe(grid=[8, 9]).fit(X, Y)


def test_rows_that_are_no_images() -> None:
    said = PatchMoe(side=5, epochs=2).fit(X[:50, :13], Y[:50]).predict_proba(X[:4, :13])
    assert np.isfinite(said).all()
