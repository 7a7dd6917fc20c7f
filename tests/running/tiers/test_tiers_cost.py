"""The forecast: what it predicts is what the tiers then count, and the sentence follows from the numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_checkpoints import save_tiny

from mixtura import specimen
from mixtura.errors import BudgetError, SettingError
from mixtura.running.loading import load
from mixtura.running.tiers.cost import Forecast, disk_rate, forecast
from mixtura.running.tiers.opening import Wish, tiers_of

SEEN = Forecast(
    num_slots=10,
    num_experts=40,
    hit_rate=0.6,
    tokens_per_second=20.0,
    p99_ms=80.0,
    missed_bytes_per_token=1e6,
    disk_limit=25.0,
    memory_limit=100.0,
    disk_bytes_per_s=25e6,
    memory_bytes_per_s=1e9,
)


def test_the_sentence_follows_from_the_numbers() -> None:
    assert SEEN.chance == 0.25
    assert SEEN.verdict.startswith("it pays")
    assert replace(SEEN, hit_rate=0.27).verdict.startswith("there is no hot set")
    assert replace(SEEN, tokens_per_second=1.0).verdict.startswith("it will be slower than people read")
    assert replace(SEEN, num_slots=40).verdict.startswith("all experts fit")


def test_what_is_predicted_is_what_is_counted() -> None:
    found = forecast(specimen.path(), Wish(memory="8GiB", context=64), num_tokens=48)
    # So much memory holds every expert; each is read once, when it is first needed.
    assert found.num_slots == found.num_experts
    assert found.measured_hit_rate is not None
    assert found.compared_hit_rate is not None
    # Finding out how it can run has read some experts before the first token is counted.
    assert found.compared_hit_rate - 0.02 <= found.measured_hit_rate <= 1
    assert 0.5 < found.compared_hit_rate < 1
    assert found.disk_limit == pytest.approx(found.disk_bytes_per_s / found.missed_bytes_per_token)
    assert found.tokens_per_second < found.memory_limit


def test_another_machine_is_not_measured() -> None:
    wish = Wish(memory="8GiB", context=64)
    slow, fast = (
        forecast(specimen.path(), wish, disk=disk, ram="10GB", num_tokens=24) for disk in ("1MB", "1GB")
    )
    assert slow.measured_tokens_per_second is None
    assert slow.tokens_per_second < fast.tokens_per_second
    assert (slow.hit_rate, slow.missed_bytes_per_token) == (fast.hit_rate, fast.missed_bytes_per_token)
    assert slow.memory_bytes_per_s == 10e9


def test_the_rate_of_the_disk_is_that_of_experts(tmp_path: Path) -> None:
    tiers = tiers_of(load(save_tiny(tmp_path / "model"), memory=Wish(pool_slots=2)))
    assert tiers is not None
    assert disk_rate(tiers.recipes) > 0


def test_what_cannot_be_forecast() -> None:
    with pytest.raises(SettingError, match="at least 9 tokens"):
        forecast(specimen.path(), Wish(memory="1GiB"), num_tokens=8)
    with pytest.raises(BudgetError, match="the smallest memory is"):
        forecast(specimen.path(), Wish(memory="1MiB"), num_tokens=16)
