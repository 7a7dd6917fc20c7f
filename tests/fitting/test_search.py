"""The search on made-up models whose true loss is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixtura.errors import BudgetError, SettingError, UnknownNameError
from mixtura.fitting.candidates import choice_bytes, drop_evenly, mixed, smallest, uniform
from mixtura.fitting.forms.experts import plan_of
from mixtura.fitting.palette import DROP, KEEP, OPTIONS, WAYS
from mixtura.fitting.records import Candidate, Measured, Parts, Prices, Quality, Request
from mixtura.fitting.rest import Rest
from mixtura.fitting.ruling import check_allocators, rules_of
from mixtura.fitting.search import OutOfTimeError, Search
from mixtura.types import Drop, Quantize, QuantizeMatrix

LAYERS, EXPERTS = 4, 8
BITS = [way.bits for way in WAYS]


def made_prices(seed: int = 0, groups: int = 1) -> Prices:
    rng = np.random.default_rng(seed)
    layers = np.repeat(np.arange(LAYERS), EXPERTS)
    numbers = np.tile(np.arange(EXPERTS), LAYERS)
    every = range(LAYERS)
    same = [dict.fromkeys(every, value) for value in (2, groups, 2 * groups)]
    experts = Parts(layers, numbers, *same)
    size = rng.uniform(0.2, 2.0, LAYERS * EXPERTS)[:, None]
    errors = size * np.array([0.0, *(4.8 * 4.0**-bits for bits in BITS), 1.0])
    num_bytes = np.tile(np.array([1600, *(int(100 * bits) + 40 for bits in BITS), 0]), (LAYERS * EXPERTS, 1))
    return Prices(experts, num_bytes, errors, rng.integers(1, 100, LAYERS * EXPERTS))


def true_loss(prices: Prices, candidate: Candidate) -> float:
    """Errors of later layers cost more, and errors add up a little more than linearly."""
    weights = 1.0 + prices.parts.layers
    rows = np.arange(len(candidate.choice))
    return float((prices.errors[rows, list(candidate.choice)] * weights).sum() ** 1.05)


def measured(prices: Prices, candidate: Candidate) -> Measured:
    loss = true_loss(prices, candidate)
    quality = Quality(
        kl=loss, kl_low=loss, kl_high=loss, equal_top=1.0, perplexity={"all": 1.0}, kl_by_domain={"all": loss}
    )
    size = choice_bytes(prices, candidate.choice)
    return Measured(
        candidate=candidate, expert_bytes=size, account_bytes=size, active_bytes=0.0, quality=quality
    )


def run(prices: Prices, budget: int, limit: int = 10**9):
    calls = []

    def measure(candidate: Candidate) -> Measured:
        if len(calls) >= limit:
            raise OutOfTimeError
        calls.append(candidate)
        return measured(prices, candidate)

    return Search(prices, prices.load.astype(float), budget, measure).run(), calls


@pytest.mark.parametrize("share", [0.15, 0.2, 0.3, 0.5, 0.9])
def test_beats_the_uniform_plan_within_the_budget(share: float) -> None:
    prices = made_prices()
    budget = int(1600 * LAYERS * EXPERTS * share)
    found, calls = run(prices, budget)
    assert choice_bytes(prices, found.chosen.candidate.choice) <= budget
    assert choice_bytes(prices, found.uniform.candidate.choice) <= budget
    assert found.chosen.quality.kl <= found.uniform.quality.kl
    assert len({c.key for c in calls}) == len(calls), "nothing is measured twice"
    if 0.2 < share < 0.9:
        assert found.chosen.quality.kl < 0.9 * found.uniform.quality.kl


@pytest.mark.parametrize(("loss", "is_packed"), [(1e-6, True), (1e9, False)])
def test_the_rest_takes_8_bits_where_that_loses_less(loss: float, is_packed: bool) -> None:
    prices, budget, saved = made_prices(), 16_000, 4_000

    def measure(candidate: Candidate) -> Measured:
        one = measured(prices, candidate)
        more = loss if candidate.packs_rest else 0.0
        return replace(one, quality=replace(one.quality, kl=one.quality.kl + more))

    found = Search(prices, prices.load.astype(float), budget, measure, rest_saves_bytes=saved).run()
    chosen = found.chosen.candidate
    assert chosen.packs_rest == is_packed
    assert found.chosen.expert_bytes <= budget + (saved if is_packed else 0)
    assert (found.chosen.expert_bytes > budget) == is_packed


def test_what_no_width_fits_has_the_rest_in_8_bits_before_experts_are_dropped() -> None:
    prices = made_prices()
    least = choice_bytes(prices, uniform(prices, prices.stored[-1]).choice)
    search = Search(
        prices,
        prices.load.astype(float),
        least - 100,
        lambda candidate: measured(prices, candidate),
        rest_saves_bytes=200,
    )
    plain = search.run().uniform.candidate
    assert plain.packs_rest
    assert set(plain.choice) == {prices.stored[-1]}


def test_is_the_same_every_time() -> None:
    prices = made_prices()
    first, second = run(prices, 20_000)[0], run(prices, 20_000)[0]
    assert first == second


def test_keeps_the_best_so_far_when_time_is_over() -> None:
    found, _ = run(made_prices(), 20_000, limit=4)
    assert found.out_of_time
    assert found.chosen.expert_bytes <= 20_000


def test_an_even_drop_takes_the_least_important_and_equally_from_each_group() -> None:
    prices = made_prices(groups=2)
    importance = np.arange(LAYERS * EXPERTS, dtype=float)
    candidate = drop_evenly(prices, importance, KEEP, 1600 * LAYERS * EXPERTS * 3 // 4)
    gone = np.asarray(candidate.choice).reshape(LAYERS, EXPERTS) == DROP
    assert gone.sum(1).tolist() == [2] * LAYERS
    assert gone[0].nonzero()[0].tolist() == [0, 4]


def test_the_smallest_model_keeps_as_many_experts_as_a_token_chooses() -> None:
    prices = made_prices()
    kept = np.asarray(smallest(prices).choice).reshape(LAYERS, EXPERTS) != DROP
    assert kept.sum(1).tolist() == [prices.parts.least_kept[0]] * LAYERS


def test_a_mixture_with_drops_leaves_enough_experts() -> None:
    prices = made_prices()
    candidate = mixed(prices, np.ones(LAYERS * EXPERTS), 4_000, "m", drop_scale=1e-6)
    kept = np.asarray(candidate.choice).reshape(LAYERS, EXPERTS) != DROP
    assert (kept.sum(1) >= 2).all()


def test_an_impossible_budget_is_refused() -> None:
    prices = made_prices()
    with pytest.raises(BudgetError):
        run(prices, choice_bytes(prices, smallest(prices).choice) - 1)


def test_a_candidate_becomes_the_plan_it_stands_for() -> None:
    prices = made_prices()
    choice = list(uniform(prices, KEEP).choice)
    choice[3], choice[9] = DROP, OPTIONS.index("4 bit")
    experts = (Drop(0, (3,)), Quantize(1, 1, "trellis", {"bits": 4}))
    rest = Rest(("lm_head.weight",), 10, 10.0)
    plan = plan_of(Candidate("x", tuple(choice)), prices.parts, rest, "sha256:1")
    assert plan.actions == experts
    packed = Candidate("x", tuple(choice), packs_rest=True)
    matrix = QuantizeMatrix("lm_head.weight", "round_to_nearest", {"bits": 8})
    assert plan_of(packed, prices.parts, rest, "sha256:1").actions == (*experts, matrix)
    assert packed.key != Candidate("x", tuple(choice)).key


def test_a_measurement_survives_json() -> None:
    prices = made_prices()
    one = measured(prices, uniform(prices, 2))
    assert Measured.from_dict(one.to_dict()) == one


def test_a_kept_domain_loses_least_of_what_loses_no_more_in_all_than_the_plain_plan() -> None:
    """Its loss is in the first layer alone, which in all counts for little."""
    prices, budget = made_prices(), 12_000
    rows = np.arange(LAYERS * EXPERTS)
    first = prices.parts.layers == 0

    def measure(candidate: Candidate) -> Measured:
        one = measured(prices, candidate)
        errors = prices.errors[rows, list(candidate.choice)]
        kept = float(errors[first].sum())
        domains = {"all": one.quality.kl, "code": kept}
        return replace(one, quality=replace(one.quality, kl_by_domain=domains))

    def search(keep: str | None):
        return Search(prices, prices.load.astype(float), budget, measure, keep_domain=keep).run()

    plain, kept = search(None), search("code")
    of = {name: found.chosen.quality for name, found in (("plain", plain), ("kept", kept))}
    uniform_plan = kept.uniform.quality
    assert of["kept"].kl_by_domain["code"] < of["plain"].kl_by_domain["code"]
    assert of["kept"].kl <= uniform_plan.kl
    allowed = [
        m.quality.kl_by_domain["code"]
        for m in kept.tried
        if m.expert_bytes <= budget and m.quality.kl <= uniform_plan.kl
    ]
    assert of["kept"].kl_by_domain["code"] == min(allowed)


def test_the_mixtures_of_named_allocators_are_tried_and_the_best_is_kept() -> None:
    prices = made_prices()
    shape = np.random.default_rng(1).uniform(0.2, 1.0, LAYERS * EXPERTS)
    prices = replace(prices, weights=prices.load * shape)
    budget = choice_bytes(prices, uniform(prices, 4).choice)
    rules = rules_of(["mc_sharp", "quant_moe_bench"], prices, 16.0)
    tried: list[Measured] = []

    def measure(candidate: Candidate) -> Measured:
        tried.append(measured(prices, candidate))
        return tried[-1]

    found = Search(prices, np.ones(LAYERS * EXPERTS), budget, measure, rules=rules).run()
    by_rule = [one for one in tried if one.candidate.label.startswith("allocated by ")]
    assert [one.candidate.label for one in by_rule] == [
        "allocated by mc_sharp",
        "allocated by quant_moe_bench",
    ]
    assert all(one.expert_bytes <= budget for one in by_rule)
    assert found.chosen.quality.kl <= min(one.quality.kl for one in by_rule)
    others, _ = run(prices, budget)
    assert not any(one.candidate.label.startswith("allocated by ") for one in others.tried)


def test_allocators_are_refused_by_name_and_for_files_of_tensors() -> None:
    request = Request(model=Path("model"), out=Path("out"), allocators=("mc_sharpe",))
    with pytest.raises(UnknownNameError, match="did you mean 'mc_sharp'"):
        check_allocators(request)
    with pytest.raises(SettingError, match="--allocate shares bits out among experts"):
        check_allocators(replace(request, allocators=("mc_sharp",), form="gguf"))


def test_allocators_whose_mixtures_are_too_large_are_named() -> None:
    prices = made_prices()
    prices = replace(prices, weights=np.ones(len(prices.load)))
    rules = rules_of(["mc_sharp"], prices, 16.0)
    least = choice_bytes(prices, uniform(prices, prices.stored[-1]).choice)
    importance = prices.load.astype(float)
    for budget, named in ((least - 1, ("mc_sharp",)), (2 * least, ())):
        search = Search(prices, importance, budget, lambda one: measured(prices, one), rules=rules)
        assert search.run().too_large == named
