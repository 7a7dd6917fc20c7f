"""Policies replayed on a table: scores, costs, and whom they are held against."""

from __future__ import annotations

import numpy as np
import pytest

from mixtura.errors import UserError
from mixtura.running.composing.planted import planted
from mixtura.running.composing.policies import hold_policies
from mixtura.running.composing.policy_page import markdown
from mixtura.running.composing.standings import as_csv
from mixtura.running.composing.tables import make_table, split
from mixtura.types.models import Outcome, Prompt


def quiet(line: str) -> None:
    del line


def test_one_call_to_the_best_model_scores_and_costs_what_the_table_says() -> None:
    table = planted(200)
    found = {one.name: one for one in hold_policies(table, ("vote",), quiet)}
    _, test = split(table, 0.5, "policies 0")
    best = test.names.index("large")
    assert found["single"].score == pytest.approx(test.scores[:, best].mean())
    assert found["single"].score == found["large"].score
    assert found["single"].cost == pytest.approx(test.costs[:, best].mean() / 1e9, rel=1e-6)
    assert found["vote"].calls == 4
    assert found["vote"].cost == pytest.approx(test.costs.sum(1).mean() / 1e9, rel=1e-6)
    # The best model is on the line that it is held against.
    assert found["large"].over_mix == pytest.approx(0.0, abs=1e-9)


def test_samples_that_agree_make_a_better_answer() -> None:
    table = planted(200, num_samples=5)
    found = {one.name: one for one in hold_policies(table, (), quiet)}
    assert found["self_consistency"].score > found["single"].score
    assert found["self_consistency"].calls == 5
    assert found["cascade"].calls < 10
    page = markdown(list(found.values()), table, "Made up.")
    assert "Made up. 200 prompts, 4 models, 5 answers of each to each at most" in page
    assert as_csv(list(found.values())).count("\n") == len(found) + 1


def test_without_costs_all_are_held_against_the_best_model() -> None:
    table = planted(120)
    outcomes = [
        Outcome(prompt=one.prompt, model=one.model, score=one.score, answer=one.answer)
        for one in table.outcomes
    ]
    free = make_table(table.prompts, [], outcomes)
    found = {one.name: one for one in hold_policies(free, (), quiet)}
    assert np.isnan(found["vote"].cost)
    assert found["large"].over_mix == 0.0
    assert found["vote"].over_mix == pytest.approx(found["vote"].score - found["large"].score)


def test_a_table_without_enough_answers() -> None:
    with pytest.raises(UserError, match="in a column 'answer'; half of the table has 0"):
        hold_policies(
            make_table([Prompt(id="a")], [], [Outcome(prompt="a", model="m", score=1.0)]), (), quiet
        )
