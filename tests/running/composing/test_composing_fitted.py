"""A router that has learned: what it decides, what it keeps, and how it compares."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixtura.errors import OutputError, UnknownNameError, UserError
from mixtura.running.composing.arena import BLIND, BOUND, HULL, hold
from mixtura.running.composing.evaluating import evaluate
from mixtura.running.composing.fitted import FittedRouter, fit_model_router, load_model_router
from mixtura.running.composing.page import markdown
from mixtura.running.composing.planted import MODELS, planted
from mixtura.running.composing.standings import as_csv
from mixtura.running.composing.tables import ReplayTable, make_table, split
from mixtura.types.models import Outcome, Prompt, Wish


@pytest.fixture(scope="module")
def halves() -> tuple[ReplayTable, ReplayTable]:
    return split(planted(500), 0.5, seed=0)


@pytest.fixture(scope="module")
def router(halves: tuple[ReplayTable, ReplayTable]) -> FittedRouter:
    return fit_model_router(halves[0], "task_prior")


def test_what_was_planted_is_found(router: FittedRouter) -> None:
    asked = [Prompt(id=task, labels={"task": task}) for task in ("algebra", "biology", "chess")]
    made = [one.model for one in router.decide(asked)]
    assert made == ["algebraist", "biologist", "large"]
    cheap = router.decide(asked, Wish(least_quality=0.3))
    assert [one.cost[str(one.model)] for one in cheap] <= [one.cost["large"] for one in cheap]
    assert cheap[0].model == "small"


def test_expected_scores_are_near_the_truth(
    router: FittedRouter, halves: tuple[ReplayTable, ReplayTable]
) -> None:
    tasks = ("algebra", "biology", "chess", "drama")
    scores = router.scores([Prompt(id=task, labels={"task": task}) for task in tasks])
    for place, card in enumerate(router.cards):
        assert np.allclose(scores.quality[:, place], MODELS[card.name][0], atol=0.2)
    # A fifth of the half that it learned from, whatever that half was split off by.
    assert 30 < router.calibration.num_prompts < 75


def test_a_saved_router_decides_the_same(
    router: FittedRouter, halves: tuple[ReplayTable, ReplayTable], tmp_path: Path
) -> None:
    router.save(tmp_path / "r")
    again = load_model_router(tmp_path / "r")
    wish = Wish(quality_per_dollar=300.0, explore=0.3)
    assert again.decide(halves[1].prompts, wish, 4) == router.decide(halves[1].prompts, wish, 4)
    assert again.cards == router.cards
    with pytest.raises(OutputError, match="is there already"):
        router.save(tmp_path / "r")


def test_an_encoder_of_the_users_own_is_asked_for_again(
    halves: tuple[ReplayTable, ReplayTable], tmp_path: Path
) -> None:
    def lengths(texts: list[str]) -> list[list[float]]:
        return [[1.0, len(text) / 100] for text in texts]

    made = fit_model_router(halves[0], "knn", lengths)
    made.save(tmp_path / "r")
    with pytest.raises(UserError, match=r"fitted with the encoder .*lengths; give it as encode="):
        load_model_router(tmp_path / "r")
    again = load_model_router(tmp_path / "r", lengths)
    assert again.decide(halves[1].prompts) == made.decide(halves[1].prompts)


def test_what_is_no_router(tmp_path: Path, router: FittedRouter) -> None:
    with pytest.raises(UserError, match="there is no router in"):
        load_model_router(tmp_path)
    router.save(tmp_path / "r")
    (tmp_path / "r" / "router.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="is damaged"):
        load_model_router(tmp_path / "r")
    (tmp_path / "r" / "router.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(UserError, match=r"is damaged|of another version"):
        load_model_router(tmp_path / "r")


def test_too_few_labels_say_how_many_are_needed() -> None:
    empty = make_table([Prompt(id="a")], [], [Outcome(prompt="a", model="m", cost=1.0)])
    with pytest.raises(UserError, match="knn learns from 1 prompt with a score or more, got 0"):
        fit_model_router(empty, "knn")


def test_money_is_not_asked_for_where_no_price_is_known() -> None:
    table = planted(60)
    free = make_table(
        table.prompts,
        [replace(card, input_price=None, output_price=None) for card in table.cards],
        table.outcomes,
    )
    router = fit_model_router(free, "best_single")
    assert router.decide(table.prompts[:1])[0].model == "large"
    with pytest.raises(UserError, match="quality_per_dollar needs to know what models cost"):
        router.decide(table.prompts[:1], Wish(quality_per_dollar=1.0))
    with pytest.raises(UserError, match="give one of most_cost and least_quality, not both"):
        fit_model_router(table, "best_single").decide(
            table.prompts[:1], Wish(most_cost=1.0, least_quality=0.5)
        )


def test_models_come_and_go(halves: tuple[ReplayTable, ReplayTable]) -> None:
    train, test = halves
    router = fit_model_router(train.only(["small", "biologist", "large"]), "uniroute")
    before = router.scores(test.prompts, router.cards)
    with pytest.raises(UserError, match="the router knows 'large' already"):
        router.admit(train.only(["large"]))
    router.admit(train.only(["algebraist"]))
    after = router.scores(test.prompts, router.cards)
    assert np.array_equal(after.quality[:, :3], before.quality)
    cheaply = {one.model for one in router.decide(test.prompts, Wish(quality_per_dollar=2000.0))}
    assert "algebraist" in cheaply
    left = [card for card in router.cards if card.name != "large"]
    assert "large" not in {one.model for one in router.decide(test.prompts, cards=left)}
    stranger = replace(router.cards[0], name="stranger")
    with pytest.raises(UnknownNameError, match="no model that the router learned of named 'stranger'"):
        router.decide(test.prompts, cards=[stranger])


def test_evaluation_is_the_mean_of_what_was_chosen(
    router: FittedRouter, halves: tuple[ReplayTable, ReplayTable]
) -> None:
    test = halves[1]
    made = router.decide(test.prompts)
    rows = {one.name: one for one in evaluate(router, test, Wish())}
    places = [test.names.index(str(one.model)) for one in made]
    expected = test.scores[np.arange(len(places)), places]
    assert rows["the router"].score == pytest.approx(expected.mean())
    assert rows["the router"].low < expected.mean() < rows["the router"].high
    assert rows["best in hindsight"].score >= max(rows[name].score for name in test.names)
    spent = test.costs[np.arange(len(places)), places].mean() * 1000 / 1e12
    assert rows["the router"].cost == pytest.approx(spent)


def test_a_log_is_evaluated_by_its_propensities(
    router: FittedRouter, halves: tuple[ReplayTable, ReplayTable]
) -> None:
    test = halves[1]
    drawn = fit_model_router(halves[0], "random").decide(test.prompts, seed=9)
    log = [
        Outcome(
            prompt=one.prompt,
            model=str(one.model),
            score=float(test.scores[row, test.names.index(str(one.model))]),
            propensity=one.propensities[str(one.model)],
        )
        for row, one in enumerate(drawn)
    ]
    rows = evaluate(router, make_table(test.prompts, test.cards, log), Wish())
    truth = evaluate(router, test, Wish())[0].score
    assert rows[0].name == "the log itself"
    assert [one.name.split(" (")[0] for one in rows[1:]] == [
        f"the router, by {name}" for name in ("ips", "snips", "dr")
    ]
    for one in rows[1:]:
        assert one.low - 0.05 < truth < one.high + 0.05


def test_a_table_with_a_model_the_router_does_not_know(router: FittedRouter) -> None:
    prompt = Prompt(id="a", labels={"task": "algebra"})
    strange = make_table([prompt], [], [Outcome(prompt="a", model="other", score=1.0)])
    with pytest.raises(UserError, match="the table has 'other', of which the router learned nothing"):
        evaluate(router, strange, Wish())
    holes = make_table([prompt], router.cards, [Outcome(prompt="a", model="small", score=1.0)])
    with pytest.raises(
        UserError, match=r"no prompt of the table has an answer of every model \(3 are missing"
    ):
        evaluate(router, holes, Wish())


def test_the_arena_ranks_what_was_planted() -> None:
    table = planted(300)
    found = {one.name: one for one in hold(table, ("uniroute",), 2, lambda line: None)}
    assert {"uniroute", "best_single", "cheapest", "random", "task_prior", BOUND, HULL, BLIND} == set(found)
    assert found["task_prior"].over_hull_low > 0
    assert found["task_prior"].verdict.startswith("beats single models mixed")
    assert found["random"].verdict == "trivial"
    assert found[BOUND].area == max(one.area for one in found.values())
    assert found[HULL].over_hull == 0.0
    page = markdown(list(found.values()), table, 2, "Made up.")
    assert "Made up. 300 prompts, 4 models" in page
    assert all(f"| `{name}` |" in page for name in ("uniroute", "best_single", "task_prior"))
    assert as_csv(list(found.values())).count("\n") == len(found) + 1


def test_the_arena_needs_enough_whole_prompts() -> None:
    with pytest.raises(UserError, match="the table has 0 such prompts of 4 models and 4 holes"):
        hold(make_table([Prompt(id="a")], planted(4).cards, []), (), 1, lambda line: None)
    with pytest.raises(UnknownNameError, match="no model router named 'kn'"):
        hold(planted(50), ("kn",), 1, lambda line: None)
