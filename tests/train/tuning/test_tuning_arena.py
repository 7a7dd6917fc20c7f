"""The arena of adapters: equal sizes, and a few steps of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtura.errors import UnknownNameError
from mixtura.train.tuning.arena.page import markdown
from mixtura.train.tuning.arena.rows import (
    FULL,
    NONE,
    PEFT_EXPERTS,
    RATE,
    RATE_OF_MATRICES,
    TRAINED,
    Entry,
    adapted,
    num_trained,
    sized,
)
from mixtura.train.tuning.arena.run import NEW, examples, hold


@pytest.mark.parametrize("name", ["expert_lora", "lora", "mos", "s_mora"])
def test_adapters_are_about_as_large_as_lora_on_experts(name: str) -> None:
    learned = examples("training", 0, 4, NEW)
    reference = num_trained(adapted(Entry(PEFT_EXPERTS), learned, 0))
    assert reference == TRAINED
    entry = sized(name, learned, 0)
    assert num_trained(adapted(entry, learned, 0)) == pytest.approx(TRAINED, rel=0.05)


def test_rates_of_what_trains_whole_matrices_are_lower() -> None:
    rates = [Entry(name).rate for name in (FULL, "esft", "lora", PEFT_EXPERTS)]
    assert rates == [RATE_OF_MATRICES, RATE_OF_MATRICES, RATE, RATE]


def test_runs_are_kept_and_what_does_not_suit_is_named(tmp_path: Path) -> None:
    rows, absent = hold(["mix_lora"], 1, 2, tmp_path, lambda _: None)
    assert list(absent) == ["mix_lora"]
    by_name = {row.name: row for row in rows}
    assert by_name[NONE].runs[0]["trained"] == 0
    assert by_name[PEFT_EXPERTS].runs[0]["loss"] != by_name[NONE].runs[0]["loss"]
    again, _ = hold(["mix_lora"], 1, 2, tmp_path, lambda _: None)
    assert [row.runs for row in again] == [row.runs for row in rows]
    assert f"- `mix_lora`: {absent['mix_lora']}" in markdown(rows, absent, 1, 2, "Here.")
    with pytest.raises(UnknownNameError, match="did you mean 'lora'"):
        hold(["lor"], 1, 2, tmp_path, print)
