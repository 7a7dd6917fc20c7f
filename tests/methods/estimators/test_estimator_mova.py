"""Views by formula; the block is the identity at its start; views that are not named are never read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators._views import CrossBlock, components, cosines, pieces, slopes
from mixtura.methods.estimators.mova import Mova

X, Y = load_iris(return_X_y=True)


def test_views_by_formula() -> None:
    x = torch.randn(5, dtype=torch.float64)
    for k, found in enumerate((cosines(5) @ x).tolist()):
        waves = [float(x[n]) * math.cos(math.pi / 5 * (n + 0.5) * k) for n in range(5)]
        assert found == pytest.approx(math.sqrt((1 if k == 0 else 2) / 5) * sum(waves))
    steps = (slopes(5) @ x).tolist()
    assert steps == pytest.approx([float(x[0]), *(x[1:] - x[:-1]).tolist()])
    found, known = components(torch.from_numpy(X)), PCA().fit(X).components_
    assert np.allclose(np.abs(found.numpy()), np.abs(known), atol=1e-6)
    assert pieces(torch.arange(1.0, 6.0)[None], 2).tolist() == [[[1, 2], [3, 4], [5, 0]]]


def test_the_block_is_the_identity_and_even_at_its_start() -> None:
    torch.manual_seed(0)
    block = CrossBlock(6, num_views=4, d_question=6, top_k=3)
    x, views = torch.randn(5, 3, 6), torch.randn(4, 5, 3, 6)
    routing = block.route(x, torch.randn(5, 6), torch.ones(5, 4, dtype=torch.bool))
    assert routing.weights.tolist() == pytest.approx([1 / 3] * 15)
    assert torch.equal(block(x, views, routing), x)


def test_a_block_by_loops() -> None:
    torch.manual_seed(0)
    block = CrossBlock(4, num_views=3, d_question=4, top_k=2).double()
    for weight in block.parameters():
        weight.data = torch.randn_like(weight)
    x, views = torch.randn(4, 2, 4).double(), torch.randn(3, 4, 2, 4).double()
    named = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0]]).bool()
    question = torch.randn(4, 4).double()
    made = block(x, views, block.route(x, question, named))
    for row in range(4):
        logits = block.gate(torch.cat([question[row], x[row].mean(0)]))
        mine = [view for view in range(3) if named[row, view]]
        best = sorted(mine, key=lambda view: -float(logits[view].detach()))[:2]
        total = sum(logits[view].exp() for view in best)
        z = x[row]
        for view in best:
            seen = block.others[view](views[view, row])
            read = block.crosses[view](block.norms[view](x[row]), seen, seen)[0]
            z = z + logits[view].exp() / total * read
        own = block.norms[3](z)
        z = z + block.attention(own, own, own)[0]
        left, right = block.up(block.norms[4](z)).chunk(2, dim=-1)
        z = z + block.down(left * left.sigmoid() * right)
        assert torch.allclose(made[row], z)


def test_views_that_are_not_named_learn_nothing_and_are_not_read() -> None:
    model = Mova(named=[[0, 2]], epochs=3).fit(X, Y)
    assert model.route(X).load.tolist() == [150, 0, 150, 0]
    before = model.predict_proba(X)
    with torch.no_grad():
        for part in (model.module_.embed[2], model.module_.block.crosses[1], model.module_.block.others[3]):
            for weight in part.parameters():
                weight.fill_(torch.nan)
    assert np.array_equal(model.predict_proba(X), before)


def test_a_question_changes_the_views_and_the_answer() -> None:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(240, 8))
    question = np.arange(240) % 2
    y = np.where(question == 0, rows[:, 1] > 0, rows @ cosines(8).numpy()[3] > 0)
    asked = np.insert(rows, 3, question, axis=1)
    model = Mova(named=[[0, 1], [2]], question_column=3, epochs=60).fit(asked[:180], y[:180])
    assert (model.predict(asked[180:]) == y[180:]).mean() > 0.8
    routing = model.route(asked[:2])
    pairs = set(zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True))
    assert pairs == {(0, 0), (0, 1), (1, 2)}
    wrong = asked.copy()
    wrong[0, 3] = 7
    with pytest.raises(UserError, match="questions of Mova \\(column 3\\) are whole numbers from 0 to 1"):
        model.predict(wrong)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"named": [[0, 4]]}, "must list views from 0 to 3"),
        ({"named": [[]]}, "must list views from 0 to 3"),
        ({"named": [[0], [1]]}, "say which question_column has them"),
        (
            {"question_column": 4, "named": [[0], [1]]},
            "the column of questions of Mova must be one of 4, beside others",
        ),
        ({"top_k": 5}, "top_k of Mova must be in"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], why: str) -> None:
    with pytest.raises(SettingError, match=why):
        Mova(**settings).fit(X, Y)
