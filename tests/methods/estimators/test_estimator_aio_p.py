"""Blocks and adapters by loops; the base stays as it was; few measurements of another kind suffice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators._plans import joined
from mixtura.methods.estimators.aio_p import AioP


def plans(num: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Six blocks of bits; the second measure is a bent one of the first, known of few."""
    X = np.random.default_rng(seed).random((num, 6))
    loss = (2.0 ** (-4 * X) * np.arange(1, 7)).sum(1) + 3 * ((1 - X[:, :-1]) * (1 - X[:, 1:])).sum(1)
    return X, np.stack([loss, 5 + 0.1 * loss**2], axis=1)


def test_who_is_joined_by_loops() -> None:
    assert joined(None, 3).tolist() == [[0, 1, 0], [0.5, 0, 0.5], [0, 1, 0]]
    assert joined([[0, 2], [0, 1]], 4).tolist() == [[0, 0.5, 0.5, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0] * 4]
    for edges in ([[0, 3]], [[0, 1, 2]], [[-1, 0]]):
        with pytest.raises(SettingError, match="edges must be pairs of blocks from 0 to 2"):
            joined(edges, 3)


def test_base_and_adapter_by_loops() -> None:
    torch.manual_seed(0)
    plan = AioP(num_nodes=3, d_hidden=4, num_layers=2).build(6, 2).double().plan
    x = torch.randn(1, 6, dtype=torch.float64)
    states = plan.states(x)
    h = [plan.embed(x[0, 2 * n : 2 * n + 2]) + plan.places[n] for n in range(3)]
    own, around = list(h), [[1], [0, 2], [1]]
    for place, layer in enumerate(plan.layers):
        means = [sum(h[m] for m in around[n]) / len(around[n]) for n in range(3)]
        h = [layer(torch.cat([h[n], means[n]])).tanh() for n in range(3)]
        both = [torch.cat([h[n], own[n]]) for n in range(3)]
        means = [sum(both[m] for m in around[n]) / len(around[n]) for n in range(3)]
        adapter = plan.adapters[0].layers[place]
        own = [adapter(torch.cat([both[n], means[n]])).tanh() for n in range(3)]
    assert torch.allclose(plan.base(states)[0], plan.head(sum(h) / 3))
    expected = plan.adapters[0].head(torch.cat([sum(h) / 3, sum(own) / 3]))
    assert torch.allclose(plan.adapters[0](states, plan.near)[0], expected)


def test_adapters_leave_the_base_as_it_was_to_the_bit() -> None:
    X, y = plans()
    y[20:, 1] = np.nan
    alone, both = AioP(epochs=4).fit(X, y[:, 0]), AioP(epochs=4).fit(X, y)
    assert np.allclose(alone.predict(X), both.predict(X)[:, 0], rtol=1e-12)
    y[:20, 1] = -y[:20, 1]
    other = AioP(epochs=4).fit(X, y)
    assert np.array_equal(other.predict(X)[:, 0], both.predict(X)[:, 0])
    assert not np.array_equal(other.predict(X)[:, 1], both.predict(X)[:, 1])


def test_the_order_of_blocks_changes_nothing_but_their_places() -> None:
    torch.manual_seed(0)
    model = AioP(num_nodes=4, edges=[[0, 1], [1, 2], [2, 3]])
    other = AioP(num_nodes=4, edges=[[3, 2], [2, 1], [1, 0]])
    first, second = model.build(8, 2).double(), other.build(8, 2).double()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        second.plan.places.copy_(first.plan.places.flip(0))
        x = torch.randn(5, 4, 2, dtype=torch.float64)
        assert torch.allclose(first(x.flatten(1)).output, second(x.flip(1).flatten(1)).output)


def test_a_measure_of_few_plans_is_carried_by_what_was_learned_of_another(tmp_path: Path) -> None:
    X, y = plans()
    new_x, new_y = plans(seed=1)
    few = y.copy()
    few[15:, 1] = np.nan
    carried, alone = [], []
    for seed in range(3):
        model = AioP(random_state=seed).fit(X, few)
        carried.append(np.corrcoef(model.predict(new_x)[:, 1], new_y[:, 1])[0, 1])
        only = AioP(random_state=seed).fit(X[:15], y[:15, 1])
        alone.append(np.corrcoef(only.predict(new_x), new_y[:, 1])[0, 1])
    assert np.mean(carried) > 0.9
    assert np.mean(carried) > np.mean(alone) + 0.02
    assert np.corrcoef(model.rank(new_x), new_y[:, 1])[0, 1] > 0.9
    assert model.score(X, few) > 0.5
    model.save(tmp_path / "kept")
    again = AioP.load(tmp_path / "kept")
    assert np.array_equal(again.predict(X), model.predict(X))


def test_the_rank_is_the_mean_over_adapters() -> None:
    X, y = plans(60)
    model = AioP(epochs=3).fit(X, np.concatenate([y, y[:, ::-1]], axis=1))
    said = (model.predict(X) - model.target_mean_) / model.target_scale_
    assert np.allclose(model.rank(X), said[:, 1:].mean(1))
    routing = model.route(X[:2])
    assert routing.weights.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3])


def test_bad_measures_and_settings_are_refused() -> None:
    X, y = plans(20)
    with pytest.raises(SettingError, match="num_nodes of AioP must divide the 6 columns"):
        AioP(num_nodes=4).fit(X, y)
    y[1:, 1] = np.nan
    with pytest.raises(UserError, match="measure 1 of AioP was taken of 1 plans; take it of 2 or more"):
        AioP().fit(X, y)
    with pytest.raises(UserError, match="20 rows with a column a measure, finite or NaN"):
        AioP().fit(X, y[:10])
