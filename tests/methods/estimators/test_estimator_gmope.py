"""Prompted experts against loops; a transfer moves prompts and head alone; prompts are kept apart."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError

from mixtura.errors import SettingError, UserError
from mixtura.methods.estimators._graphs import likeness, surroundings
from mixtura.methods.estimators.gmope import Gmope

X, Y = load_iris(return_X_y=True)
EDGES = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 1, 2]])


def graph(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes whose few neighbours are of their class, or whose many neighbours are of the other."""
    generator = np.random.default_rng(seed)
    y = np.arange(160) % 2
    rows = y[:, None] * 0.5 + generator.normal(size=(160, 4))
    pairs = []
    for node, label in enumerate(y):
        alike = node % 4 < 2
        of_class = label if alike else 1 - label
        chosen = generator.choice(np.flatnonzero(y == of_class), 4 if alike else 12)
        pairs += [(other, node) for other in chosen]
    return rows, y, np.array(pairs).T


def test_surroundings_by_loops() -> None:
    x = torch.randn(4, 2, dtype=torch.float64)
    found = surroundings(x, EDGES)
    into = {node: [s for s, e in EDGES.T.tolist() if e == node] for node in range(4)}
    for node in range(4):
        num = max(len(into[node]), 1)
        counts = [math.log1p(len(into[other])) for other in into[node]]
        expected = [sum(float(x[o, d]) for o in into[node]) / num for d in range(2)]
        expected += [sum(counts) / num, sum(c * c for c in counts) / num, math.log1p(len(into[node]))]
        assert found[node].tolist() == pytest.approx(expected)


def test_likeness_by_loops() -> None:
    rows = torch.randn(3, 4, dtype=torch.float64)
    total = 0.0
    for a in range(3):
        for b in range(3):
            if a != b:
                total += float(torch.cosine_similarity(rows[a], rows[b], dim=0)) ** 2
    assert float(likeness(rows)) == pytest.approx(total / 6)
    assert float(likeness(torch.eye(4))) == pytest.approx(0, abs=1e-6)
    assert float(likeness(rows[:1])) == pytest.approx(0, abs=1e-9)


def test_an_output_is_the_mixture_of_prompted_networks() -> None:
    torch.manual_seed(0)
    module = Gmope(num_experts=3, top_k=2, d_hidden=5, d_prompt=2).build(2, 2).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    passed = module(x, EDGES)
    logits = surroundings(x, EDGES) @ module.gate.weight.double().T
    for node in range(4):
        scores = logits[node].exp()
        best = scores.argsort(descending=True)[:2].tolist()
        mixed = torch.zeros(5, dtype=torch.float64)
        for expert in best:
            prompted = torch.cat([x, module.prompts[expert].repeat(4, 1)], dim=1)
            mixed += scores[expert] / scores[best].sum() * module.graph(prompted, EDGES)[node].relu()
        assert torch.allclose(passed.output[node], module.head(mixed), atol=1e-5)


def test_a_transfer_moves_prompts_and_head_alone(tmp_path: Path) -> None:
    model = Gmope(epochs=10).fit(X, Y > 0)
    before = {name: one.clone() for name, one in model.module_.state_dict().items()}
    model.transfer(X[::-1], Y[::-1])
    assert model.classes_.tolist() == [0, 1, 2]
    after = model.module_.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"prompts", "head.weight", "head.bias"}
    model.save(tmp_path / "kept")
    again = Gmope.load(tmp_path / "kept")
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))


def test_several_prompts_carry_more_than_one_to_another_graph() -> None:
    rows, y, edges = graph(0)
    new_rows, new_y, new_edges = graph(1)
    known = np.where(np.arange(160) < 60, 1 - new_y, -1)
    right = {}
    for num in (1, 4):
        found = []
        for seed in range(3):
            model = Gmope(num_experts=num, top_k=min(num, 2), epochs=60, random_state=seed)
            model.fit(rows, y, edges=edges).transfer(new_rows, known, edges=new_edges)
            found.append((model.predict(new_rows, new_edges)[60:] == 1 - new_y[60:]).mean())
        right[num] = float(np.mean(found))
    assert right[4] > max(right[1] + 0.02, 0.65)


def test_prompts_are_kept_apart() -> None:
    free, held = (Gmope(apart=apart, epochs=40).fit(X, Y).module_.prompts for apart in (0.0, 10.0))
    assert float(likeness(held)) < 0.02 < float(likeness(free))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SettingError, match="top_k"):
        Gmope(num_experts=2, top_k=3).fit(X, Y)
    with pytest.raises(NotFittedError):
        Gmope().transfer(X, Y)
    model = Gmope(epochs=1).fit(X, Y)
    with pytest.raises(UserError, match="2 features"):
        model.transfer(X[:, :2], Y)
    with pytest.raises(UserError, match="one class alone"):
        model.transfer(X, np.zeros(150))
    with pytest.raises(UserError, match="edges of Gmope name rows"):
        model.transfer(X, Y, edges=np.array([[0], [150]]))
    assert model.predict(X).shape == (150,)
