"""Copies are the dense network; a group's expert always learns its rows; the column is no feature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators.apollo_moe import ApolloMoe

X, Y = load_iris(return_X_y=True)


def cities(seed: int, sizes: tuple[int, ...] = (200, 200, 25)) -> tuple[np.ndarray, np.ndarray]:
    """Rows of three cities, each about a place of its own and with a rule of its own, the last one rare."""
    generator = np.random.default_rng(seed)
    city = np.repeat(np.arange(3), sizes)
    rows = generator.normal(size=(len(city), 6))
    y = np.where(city == 2, rows[:, 3] + rows[:, 0] > 0, rows[np.arange(len(city)), city] > 0)
    return np.column_stack([rows + 2.5 * np.eye(6)[city + 3], city]), y.astype(int)


def test_copies_say_what_the_dense_network_says() -> None:
    torch.manual_seed(0)
    module = ApolloMoe(num_layers=3, expert_layers=2, num_experts=3).build(4, 3).double().eval()
    x = torch.randn(20, 4, dtype=torch.float64)
    assert not torch.allclose(module(x).output, module.dense(x))
    module.copy()
    assert torch.allclose(module(x).output, module.dense(x), atol=1e-6)
    assert len(module.experts) == 6


def test_the_first_layers_have_no_experts_and_the_last_do_by_loops() -> None:
    torch.manual_seed(0)
    module = ApolloMoe(num_experts=3, top_k=2, d_hidden=5).build(4, 2).double().eval()
    x = torch.randn(6, 4, dtype=torch.float64)
    made = module(x).output
    for row in range(6):
        h = module.embed(x[row])
        h = h + module.layers[0](h.relu())
        scores = (module.gates[0].weight.double() @ h.relu()).exp()
        best = scores.argsort(descending=True)[:2]
        h = h + sum(scores[e] / scores[best].sum() * module.experts[e](h.relu()) for e in best)
        assert torch.allclose(made[row], module.head(h.relu()), atol=1e-5)


def test_in_training_a_row_teaches_the_expert_of_its_family() -> None:
    torch.manual_seed(0)
    model = ApolloMoe(group_column=1, families=[2, 0, 2], num_experts=4, top_k=1)
    module = model.build(3, 2).double().train()
    x = torch.randn(9, 3, dtype=torch.float64)
    x[:, 1] = torch.arange(9) % 3
    routing = module(x).routing
    taken = dict(zip(routing.token_ids.tolist(), routing.expert_ids.tolist(), strict=True))
    assert [taken[row] for row in range(9)] == [2, 0, 2] * 3


def test_the_column_is_not_looked_at_afterwards() -> None:
    rows, y = cities(0)
    model = ApolloMoe(group_column=6, num_experts=3, epochs=5).fit(rows, y)
    other = rows.copy()
    other[:, 6] = 99.5
    assert np.array_equal(model.predict_proba(rows), model.predict_proba(other))


def test_rows_of_unknown_groups_may_be_learned() -> None:
    rows, y = cities(0)
    rows[::3, 6] = -1
    assert ApolloMoe(group_column=6, num_experts=3, epochs=20).fit(rows, y).score(rows, y) > 0.85


def test_what_cannot_be_is_refused() -> None:
    rows, y = cities(0)
    with pytest.raises(UserError, match="groups of ApolloMoe \\(column 6\\) are whole numbers from -1 to 1"):
        ApolloMoe(group_column=6, num_experts=2).fit(rows, y)
    with pytest.raises(SettingError, match="the column of groups of ApolloMoe must be one of 7"):
        ApolloMoe(group_column=7).fit(rows, y)
    with pytest.raises(SettingError, match="at most num_layers, 2, got 3"):
        ApolloMoe(expert_layers=3).fit(X, Y)
    with pytest.raises(SettingError, match="must name experts from 0 to 3"):
        ApolloMoe(families=[0, 4]).fit(X, Y)
