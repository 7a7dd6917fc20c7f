"""MoE embeddings: pairs, the ranking loss by a loop, and experts that only their own domain changes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators._pairs import pairs_of, ranking_loss
from mixtura.methods.estimators.moe_embeddings import MoeEmbeddings

GENERATOR = np.random.default_rng(2)
X = GENERATOR.normal(size=(80, 6))
X[40:] = X[:40] + 0.4 * X[40:]
PARTNER = np.r_[40:80, 0:40]
DOMAIN = np.tile(np.repeat(["code", "prose"], 20), 2)


def test_a_pair_is_learned_once() -> None:
    firsts, seconds = pairs_of([1, 0, 3, 1], 4, "Any")
    assert list(zip(firsts.tolist(), seconds.tolist(), strict=True)) == [(0, 1), (2, 3), (3, 1)]


def test_the_ranking_loss_by_loops() -> None:
    a, b = (F.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1) for _ in range(2))
    total = 0.0
    for i in range(5):
        row = [math.exp(7 * float(a[i] @ b[j])) for j in range(5)]
        column = [math.exp(7 * float(a[j] @ b[i])) for j in range(5)]
        total -= math.log(row[i] / sum(row)) + math.log(column[i] / sum(column))
    assert float(ranking_loss(a, b, 7.0)) == pytest.approx(total / 10)


def test_the_network_by_a_loop() -> None:
    model = MoeEmbeddings(epochs=2, d_model=5).fit(X, PARTNER, groups=DOMAIN)
    net, said = model.module_, model.transform(X, groups=DOMAIN)
    for row in range(0, 80, 7):
        place = int(DOMAIN[row] == "prose")
        h = net.reads(torch.from_numpy((X[row] - model.mean_) / model.scale_)) + net.domains[place]
        made = h + net.experts[place](net.norm(h))
        assert np.allclose(said[row], (made / made.norm()).detach().numpy())


def test_equal_copies_are_the_dense_model() -> None:
    model = MoeEmbeddings(epochs=1, learning_rate=0.0).fit(X, PARTNER, groups=DOMAIN)
    with torch.no_grad():
        model.module_.domains.zero_()
    first, second = (model.transform(X, groups=np.full(80, name)) for name in ("code", "prose"))
    assert np.array_equal(first, second)
    assert np.allclose(model.transform(X), first)


def test_other_domains_experts_learn_nothing() -> None:
    model = MoeEmbeddings(epochs=1).fit(X, PARTNER, groups=DOMAIN)
    model.module_.zero_grad()
    code = model._given(X[:20], np.zeros(20))
    ranking_loss(model.module_(code).output, model.module_(code).output, 5.0).backward()
    assert all(not one.grad.any() for one in model.module_.experts[1].parameters())
    assert any(one.grad.any() for one in model.module_.experts[0].parameters())
    assert not model.module_.domains.grad[1].any()


def test_learning_brings_partners_together() -> None:
    # What tells rows of one domain apart is noise in the other.
    noisy = X.copy()
    code = DOMAIN == "code"
    noisy[code, :3] = 4 * GENERATOR.normal(size=(40, 3))
    noisy[~code, 3:] = 4 * GENERATOR.normal(size=(40, 3))
    before = MoeEmbeddings(epochs=1, learning_rate=0.0).fit(noisy, PARTNER, groups=DOMAIN)
    after = MoeEmbeddings(epochs=60).fit(noisy, PARTNER, groups=DOMAIN)
    assert after.score(noisy, PARTNER, groups=DOMAIN) > before.score(noisy, PARTNER, groups=DOMAIN) + 0.3


@pytest.mark.parametrize(
    ("y", "says"),
    [
        (None, "requires y to be passed as the number of each row's partner, 80 in all, got none"),
        (np.full(80, 0.5), "80 in all, got float64"),
        (np.arange(80), "must be another row, from 0 to 79"),
        (np.full(80, 80), "must be another row"),
        (PARTNER[:3], "80 in all"),
    ],
)
def test_bad_partners_are_refused(y: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        MoeEmbeddings(epochs=1).fit(X, y)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(SettingError, match="scale of MoeEmbeddings"):
        MoeEmbeddings(scale=0.0).fit(X, PARTNER)
