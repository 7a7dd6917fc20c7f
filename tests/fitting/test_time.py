"""The time given is kept: passes stop between layers, what was left out is named, progress is told."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import save_tiny

from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.errors import BudgetError
from mixtura.fitting import Request, fit
from mixtura.fitting.candidates import choice_bytes, uniform
from mixtura.fitting.clock import Clock, Progress
from mixtura.fitting.forms.base import Tools
from mixtura.fitting.forms.experts import ExpertsForm
from mixtura.fitting.journal import open_journal
from mixtura.fitting.judging import Judge
from mixtura.fitting.palette import WAYS
from mixtura.fitting.pricing import experts_of, option_bytes
from mixtura.fitting.records import Candidate, Measured, Prices, Quality
from mixtura.fitting.search import OutOfTimeError, Search
from mixtura.fitting.texts import texts_of


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> CheckpointView:
    return open_checkpoint(save_tiny(tmp_path_factory.mktemp("time") / "tiny"))


def made_prices(view: CheckpointView) -> Prices:
    layers = view.layers
    sizes = np.concatenate([np.tile(option_bytes(x), (x.num_experts, 1)) for x in layers])
    weight = np.random.default_rng(0).uniform(0.2, 2.0, len(sizes))[:, None]
    errors = weight * np.array([0.0, *(4.8 * 4.0**-way.bits for way in WAYS), 1.0])
    return Prices(experts_of(layers), sizes, errors, np.ones(len(sizes), dtype=np.int64))


def search_until(prices: Prices, limit: int):
    """A search over a made-up loss in which time is over after so many candidates."""
    measured: list[Candidate] = []

    def measure(candidate: Candidate) -> Measured:
        if len(measured) >= limit:
            raise OutOfTimeError
        measured.append(candidate)
        rows = np.arange(len(candidate.choice))
        loss = float(prices.errors[rows, list(candidate.choice)].sum())
        quality = Quality(
            kl=loss, kl_low=loss, kl_high=loss, equal_top=1.0, perplexity={"all": 1.0}, kl_by_domain={}
        )
        size = choice_bytes(prices, candidate.choice)
        return Measured(
            candidate=candidate, expert_bytes=size, account_bytes=size, active_bytes=0.0, quality=quality
        )

    budget = (
        choice_bytes(prices, uniform(prices, 1).choice) + choice_bytes(prices, uniform(prices, 2).choice)
    ) // 2
    return Search(prices, prices.load.astype(float), budget, measure).run(), measured


def test_two_candidates_are_enough_for_a_plan_that_beats_the_plain_one(view: CheckpointView) -> None:
    prices = made_prices(view)
    found, measured = search_until(prices, 2)
    assert len(measured) == 2
    assert found.chosen.candidate.key == measured[1].key != found.uniform.candidate.key
    assert found.chosen.quality.kl < found.uniform.quality.kl
    assert found.left_out[0].startswith("what each block")
    assert "even drops" in found.left_out
    assert found.left_out[-1] == "every uniform width"


def test_each_step_that_time_did_not_reach_is_named_and_none_otherwise(view: CheckpointView) -> None:
    prices = made_prices(view)
    whole, every = search_until(prices, 10**9)
    assert whole.left_out == ()
    assert not whole.out_of_time
    none, _ = search_until(prices, 1)
    last, _ = search_until(prices, len(every) - 1)
    assert none.left_out[0] == "a mixture of widths"
    assert last.left_out == none.left_out[-len(last.left_out) :]
    assert len(last.left_out) < len(none.left_out)


def test_the_plain_plan_is_measured_without_time_and_nothing_else(
    view: CheckpointView, tmp_path: Path
) -> None:
    request = Request(model=view.path, out=tmp_path, calibration_tokens=256, held_out_tokens=256)
    texts = texts_of(request, 64, load_tokenizer(view.path))
    over = Clock(time.monotonic() - 10.0, 1.0)
    prices = made_prices(view)
    with open_journal(tmp_path / "work", {}) as journal:

        def judge_without_time() -> Judge:
            form = ExpertsForm(request, view)
            form.begin(Tools(journal, over, lambda _: None))
            form.price_with(prices)
            return Judge(form, texts.held_out, journal, clock=over, seed=0, notify=lambda _: None)

        judge = judge_without_time()
        assert judge.original().kl == 0
        plain = judge.measure(uniform(prices, 2))
        assert plain.quality.kl > 0
        with pytest.raises(OutOfTimeError):
            judge.measure(uniform(prices, 1))
        # Gone on with, it is known, and no other is measured in its place.
        judge = judge_without_time()
        assert judge.measure(uniform(prices, 2)) == plain
        with pytest.raises(OutOfTimeError):
            judge.measure(uniform(prices, 1))
        keys = set(journal.notes())
    assert keys == {"original", uniform(prices, 2).key}


def test_progress_is_told_now_and_then_with_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    said: list[str] = []
    progress = Progress("observing", 10, said.append)
    for _ in range(10):
        now[0] += 6.0
        progress.advance()
    assert said[0] == "observing: layer 2 of 10, about 48.0 s left"
    assert [line.split(",")[0] for line in said] == [f"observing: layer {n} of 10" for n in (2, 4, 6, 8)]


@pytest.mark.slow
def test_a_refusal_says_that_time_was_over_and_what_was_left_out(
    view: CheckpointView, tmp_path: Path
) -> None:
    said: list[str] = []
    request = Request(model=view.path, out=tmp_path / "out", max_kl=0.0, time_s=1e-3)
    with pytest.raises(BudgetError, match="time was over before everything was tried; left out: a mixture"):
        fit(request, said.append)
    assert any(line.startswith("to keep the time") for line in said)
