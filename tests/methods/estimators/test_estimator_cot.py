"""Guided maps, partners and mixtures by loops; pairs that were not learned are said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators._compositions import TEMPERATURE, Composer, Guided, partners
from mixtura.methods.estimators.cot import Cot


def pictures(seed: int, num: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """A bar that stands, lies or crosses on 6 x 6, and is faint, bright or noisy."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 3, (num, 2))
    made = np.zeros((num, 6, 6))
    for image, (manner, thing) in zip(made, y, strict=True):
        at = generator.integers(1, 5)
        if thing != 1:
            image[:, at] = 1
        if thing != 0:
            image[at, :] = 1
        image *= (1.0, 3.0, 1.5)[manner]
        image += (0.1, 0.1, 0.7)[manner] * generator.normal(size=(6, 6))
    words = np.array([["faint", "bright", "noisy"], ["stands", "lies", "crosses"]])
    return made.reshape(num, -1), np.stack([words[0][y[:, 0]], words[1][y[:, 1]]], axis=1)


def left_out(y: np.ndarray) -> np.ndarray:
    """Whether a pair is one of two that are not learned."""
    return (y == ["faint", "lies"]).all(1) | (y == ["noisy", "stands"]).all(1)


def test_a_guided_map_by_loops() -> None:
    torch.manual_seed(0)
    guide = Guided(3, 4).double()
    f, thing = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 4).double()
    made = guide(f, thing)
    for row in range(2):
        pooled = torch.stack([f[row, c].mean() for c in range(3)])
        chosen = guide.channels(torch.cat([thing[row], pooled])).sigmoid()
        g = torch.stack([f[row, c] * chosen[c] for c in range(3)])
        plane = torch.stack([thing[row].mean().expand(4, 5), (g[0] + g[1] + g[2]) / 3])
        place = guide.places(plane[None])[0, 0].sigmoid()
        assert torch.allclose(made[row], f[row] + g * place)
    with torch.no_grad():
        guide.channels[-1].weight.zero_()
        guide.channels[-1].bias.fill_(-1e3)
    assert torch.equal(guide(f, thing), f)


def test_partners_have_the_same_object_and_rare_attributes_come_more() -> None:
    torch.manual_seed(0)
    target = torch.tensor([[0, 0]] * 30 + [[1, 0]] * 3 + [[1, 1]] * 2 + [[0, 2]])
    frequency = target[:, 0].bincount().double()
    found = torch.stack([partners(target, frequency) for _ in range(200)])
    assert (target[found, 1] == target[:, 1]).all()
    assert (found[:, -1] == len(target) - 1).all()
    assert (found[:, :-1] != torch.arange(len(target) - 1)).all()
    rare = (target[found[:, 0], 0] == 1).double().mean()
    expected = (3 / 5) / (3 / 5 + 29 / 31)
    assert float(rare) == pytest.approx(expected, abs=0.1)


def test_the_loss_of_mixtures_by_loops() -> None:
    torch.manual_seed(0)
    net = Composer((1, 4), 3, 2, 5).double()
    target = torch.tensor([[0, 0], [1, 0], [2, 1]])
    net.seen[target[:, 0], target[:, 1]] = True
    net.seen[0, 1] = True
    both = torch.randn(3, 5).double()
    torch.manual_seed(7)
    found = float(net.mixed_loss(both, target).detach())
    torch.manual_seed(7)
    other = partners(target, net.frequency).tolist()
    assert other == [1, 0, 2]
    share = float(torch.rand(()))
    cosine = torch.nn.functional.cosine_similarity
    lost = 0.0
    for row in range(3):
        a, b = target[row], target[other[row]]
        seen = share * both[row] + (1 - share) * both[other[row]]
        attribute = share * net.attributes[a[0]] + (1 - share) * net.attributes[b[0]]
        meant = net.compose(torch.cat([net.objects[a[1]], attribute]))
        logits = [cosine(seen, meant, dim=0) / TEMPERATURE]
        for pair in [(0, 0), (1, 0), (2, 1), (0, 1)]:
            if pair not in (tuple(a.tolist()), tuple(b.tolist())):
                word = net.compose(torch.cat([net.objects[pair[1]], net.attributes[pair[0]]]))
                logits.append(cosine(seen, word, dim=0) / TEMPERATURE)
        lost += float((torch.stack(logits).logsumexp(0) - logits[0]).detach()) / 3
    assert found == pytest.approx(lost)


def test_words_of_pairs_are_in_the_order_of_outputs() -> None:
    torch.manual_seed(0)
    net = Composer((1, 4), 3, 2, 5)
    words = net.words()
    for attribute in range(3):
        for thing in range(2):
            expected = net.compose(torch.cat([net.objects[thing], net.attributes[attribute]]))
            assert torch.allclose(words[attribute * 2 + thing], expected, atol=1e-6)


def test_pairs_that_were_never_learned_are_said(tmp_path: Path) -> None:
    X, y = pictures(0)
    unseen = left_out(y)
    new_x, new_y = pictures(1)
    new = left_out(new_y)
    model = Cot(grid=[6, 6], epochs=30).fit(X[~unseen], y[~unseen])
    assert model.score(new_x[~new], new_y[~new]) > 0.85
    # Chance is one of nine.
    assert model.score(new_x[new], new_y[new]) > 0.35
    assert model.set_params(unseen=1.0).score(new_x[new], new_y[new]) > 0.4
    before = model.set_params(unseen=-2.0).predict(new_x)
    assert not left_out(before).any()
    model.save(tmp_path / "kept")
    again = Cot.load(tmp_path / "kept")
    assert np.array_equal(again.predict(new_x), before)
    assert model.predict_proba(new_x).sum((1, 2)) == pytest.approx(1)


def test_bad_targets_and_settings_are_refused() -> None:
    X, y = pictures(0, 30)
    with pytest.raises(UserError, match="30 rows of an attribute and an object"):
        Cot().fit(X, y[:, 0])
    with pytest.raises(UserError, match="one class alone"):
        Cot().fit(X, np.stack([y[:, 0], y[:, 0][:1].repeat(30)], axis=1))
    with pytest.raises(SettingError, match="grid of Cot must be two numbers of product 36"):
        Cot(grid=[5, 6]).fit(X, y)
