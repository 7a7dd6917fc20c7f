"""LLMoE: answers decide which expert learns and trades; windows in words; wealth by a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtura.errors import UserError
from mixtura.methods.estimators._markets import log_wealth, outlook
from mixtura.methods.estimators.llmoe import Llmoe

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(0, 0.01, size=(200, 6))
Y = GENERATOR.normal(0, 0.01, size=200)
ANSWERS = np.array(["optimistic", "pessimistic"])[GENERATOR.integers(0, 2, 200)]


def test_each_row_is_served_by_the_expert_of_its_answer() -> None:
    model = Llmoe(epochs=3).fit(X, Y, groups=ANSWERS)
    said = model.predict(X, groups=ANSWERS)
    for row in range(len(X)):
        expert = model.module_.experts[int(ANSWERS[row] == "pessimistic")]
        x = torch.from_numpy((X[row] - model.mean_) / model.scale_)
        wanted = float(expert(x).detach()) * model.target_scale_[0] + model.target_mean_[0]
        assert said[row] == pytest.approx(wanted)
    routing = model.route(X, groups=ANSWERS)
    assert routing.load.tolist() == [(ANSWERS == "optimistic").sum(), (ANSWERS == "pessimistic").sum()]


def test_an_expert_learns_from_its_own_rows_alone() -> None:
    changed = np.where(ANSWERS == "pessimistic", Y[::-1], Y)
    # Targets are standardised over all rows, and those of one outlook are only turned round.
    changed[ANSWERS == "pessimistic"] = Y[ANSWERS == "pessimistic"][::-1]
    settings = {"epochs": 1, "batch_size": 200, "learning_rate": 1e-3}
    models = [Llmoe(**settings).fit(X, one, groups=ANSWERS) for one in (Y, changed)]  # type: ignore[arg-type]
    good = ANSWERS == "optimistic"
    said = [model.predict(X, groups=ANSWERS) for model in models]
    # One step of Adam hardly depends on how long a gradient is, so clipping over all changes next to nothing.
    assert np.allclose(said[0][good], said[1][good], atol=1e-6)
    assert not np.allclose(said[0][~good], said[1][~good], atol=1e-6)


def test_without_answers_the_windows_gain_decides() -> None:
    assert outlook(X).tolist() == ["optimistic" if sum(row) > 0 else "pessimistic" for row in X]
    one, other = Llmoe(epochs=2).fit(X, Y), Llmoe(epochs=2).fit(X, Y, groups=outlook(X))
    assert np.array_equal(one.predict(X), other.predict(X, groups=outlook(X)))


def test_an_outlook_that_was_never_learned_is_served_by_the_other() -> None:
    model = Llmoe(epochs=2).fit(X, Y, groups=np.full(200, "optimistic"))
    bad = model.predict(X, groups=np.full(200, "pessimistic"))
    assert np.array_equal(bad, model.predict(X, groups=np.full(200, "optimistic")))


def test_positions_are_all_or_nothing_above_the_cost() -> None:
    model = Llmoe(epochs=3, cost=0.001).fit(X, Y, groups=ANSWERS)
    said = model.predict(X, groups=ANSWERS)
    assert model.positions(X, groups=ANSWERS).tolist() == [float(one > 0.001) for one in said]


def test_windows_in_words() -> None:
    (text,) = Llmoe().prompts(np.array([[0.01, -0.025]]), news=["It rained."])
    assert text.splitlines() == [
        "Returns so far, oldest first: +1.00 %, -2.50 %.",
        "News: It rained.",
        "How is the outlook for the next period?",
        "Answer with one word, optimistic or pessimistic.",
    ]
    with pytest.raises(UserError, match="news must be one text a row, 200 in all, got 1"):
        Llmoe().prompts(X, news=["It rained."])


def test_other_answers_are_refused() -> None:
    with pytest.raises(UserError, match="no group named 'optimist'; did you mean 'optimistic'"):
        Llmoe(epochs=1).fit(X, Y, groups=np.full(200, "optimist"))


def test_wealth_by_a_loop() -> None:
    positions, cost = GENERATOR.random(200), 0.002
    wealth, held = 1.0, 0.0
    for wanted, change in zip(positions, Y, strict=True):
        wealth *= (1 - cost * abs(wanted - held)) * (1 + wanted * change)
        held = wanted
    assert log_wealth(positions, Y, cost) == pytest.approx(np.log(wealth))
