"""Edits differ in one place and are not told by it; preference is over a reference; subtle errors show."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators._edits import EDITS, Editor, pairs, preference
from mixtura.methods.estimators.rise import Rise


def sums(num: int, seed: int) -> np.ndarray:
    """Rows a, o, b, a o b."""
    draw = np.random.default_rng(seed)
    a, b = draw.integers(1, 13, (2, num))
    sign = draw.choice([-1, 1], num)
    return np.stack([a, sign, b, a + sign * b], axis=1).astype(float)


def task(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Right sums, and sums with the result of another."""
    right, wrong = sums(150, seed), sums(150, seed + 1)
    wrong[:, 3] = sums(150, seed + 2)[:, 3]
    return np.concatenate([right, wrong]), np.repeat([True, False], 150)


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_is_of_its_kind_and_not_told_by_a_number_alone(kind: str) -> None:
    right = sums(200, 0)
    known = {tuple(row) for row in right}
    made, good = Editor(right, 0.5).edit(right, [kind], np.random.default_rng(1))
    assert good.sum() > 20
    for row, edited in zip(right[good], made[good], strict=True):
        changed = np.flatnonzero(row != edited)
        assert tuple(edited) not in known
        assert ((edited >= right.min(0)) & (edited <= right.max(0))).all()
        if kind == "swap":
            assert sorted(row) == sorted(edited)
            assert len(changed) == 2
            continue
        (column,) = changed
        if kind == "number":
            assert edited[column] in right[:, column]
            # Within half a deviation, or the next value where none is.
            others = np.unique(right[:, column])
            gap = np.abs(others[others != row[column]] - row[column]).min()
            assert abs(edited[column] - row[column]) <= max(0.5 * right[:, column].std(), 0) + gap
        elif kind == "related":
            assert edited[column] in row
        elif kind == "deletion":
            assert edited[column] == 0
        else:
            assert (column, edited[column]) == (1, -row[1])


def test_edits_of_a_sum_are_wrong_but_where_two_numbers_of_a_row_exchange() -> None:
    right = sums(300, 3)
    made = Rise(edits=["number", "operator"], epochs=1, num_edits=1).fit(*task(0)).edit(right)
    made = made[~np.isnan(made).any(1)]
    assert len(made) > 200
    assert (made[:, 0] + made[:, 1] * made[:, 2] != made[:, 3]).all()


def test_only_named_columns_are_edited() -> None:
    right = sums(100, 4)
    made, good = Editor(right, 0.5, [0, 3]).edit(right, EDITS, np.random.default_rng(0))
    assert good.any()
    assert np.array_equal(made[:, 1:3], right[:, 1:3])


def test_pairs_by_loops() -> None:
    torch.manual_seed(0)
    right, wrong = torch.arange(3.0)[:, None], torch.tensor([[9.0], [8.0]])
    edits = [torch.tensor([[0.5], [torch.nan], [2.5]])]
    better, worse = pairs(right, wrong, edits)
    assert list(zip(better[:2, 0].tolist(), worse[:2, 0].tolist(), strict=True)) == [(0.0, 0.5), (2.0, 2.5)]
    assert better[2:, 0].tolist() == [0.0, 1.0, 2.0]
    assert set(worse[2:, 0].tolist()) <= {8.0, 9.0}
    assert len(pairs(right, wrong, [])[0]) == 3


def test_the_loss_of_preference_by_the_probability_that_the_better_one_wins() -> None:
    ahead, before = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, 3.0])
    wins = [1 / (1 + math.exp(-0.4 * (a - b))) for a, b in zip(ahead.tolist(), before.tolist(), strict=True)]
    assert float(preference(ahead, before, 0.4)) == pytest.approx(-np.mean(np.log(wins)), rel=1e-5)
    # At the reference nothing is preferred yet.
    assert float(preference(before, before, 0.4)) == pytest.approx(math.log(2))


def test_subtle_errors_are_told_where_labels_alone_do_not_tell_them(tmp_path: Path) -> None:
    X, y = task(10)
    tested = sums(300, 20)
    tested[:150, 3] += np.where(np.arange(150) % 2, 1, -1) * (1 + np.arange(150) % 3)
    truth = np.arange(300) >= 150
    area = {}
    for num in (0, 8):
        model = Rise(num_edits=num, epochs=12).fit(X, y)
        area[num] = roc_auc_score(truth, model.predict_proba(tested)[:, 1])
    assert area[8] > area[0] + 0.03
    assert area[8] > 0.75
    model.save(tmp_path / "kept")
    again = Rise.load(tmp_path / "kept")
    assert np.array_equal(again.edit(tested, 3), model.edit(tested, 3), equal_nan=True)


def test_what_cannot_be_is_refused() -> None:
    X, y = task(0)
    with pytest.raises(SettingError, match=r"edits of Rise must be among number, .* got \['typo'\]"):
        Rise(edits=["typo"]).fit(X, y)
    with pytest.raises(SettingError, match="columns of Rise must be from 0 to 3, got \\[4\\]"):
        Rise(columns=[4]).fit(X, y)
    with pytest.raises(UserError, match="Only binary classification"):
        Rise().fit(X, np.arange(300) % 3)
    with pytest.raises(SettingError, match="beta of Rise must be in"):
        Rise(beta=0.0).fit(X, y)
