"""Curricula: shares by stage, made tasks, and that a sequence depends on its number alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.data import specimen
from mixtura.errors import SettingError, UnknownNameError, UserError
from mixtura.train.config import build_config, differences
from mixtura.train.stages import Stage, StagedSequences, stage_of
from mixtura.train.text import collate

STAGES = (
    Stage(until=50, shares={"code": 0.5, "tasks": 0.5}, tasks={"addition": 1}, largest=9),
    Stage(shares={"code": 0.25, "prose": 0.7, "tasks": 0.05}),
)
LENGTH, PER_STEP, NUM_STEPS = 16, 4, 300


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(specimen.path())


def made(tokenizer: Any, start_id: int | None = None, stages: tuple[Stage, ...] = STAGES) -> StagedSequences:
    streams = {
        name: np.random.default_rng(place).integers(0, 4000, 900)
        for place, name in enumerate(("code", "prose"))
    }
    return StagedSequences(
        streams,
        stages,
        tokenizer,
        num_sequences=NUM_STEPS * PER_STEP,
        per_step=PER_STEP,
        length=LENGTH,
        start_id=start_id,
        seed=3,
    )


def test_each_stage_keeps_its_shares(tokenizer: Any) -> None:
    data = made(tokenizer)
    assert data.domains == ("code", "prose", "tasks")
    places = np.array([data[number]["domain"] for number in range(len(data))])
    for stage, part in zip(STAGES, (places[:200], places[200:]), strict=True):
        for place, name in enumerate(data.domains):
            assert (part == place).mean() == pytest.approx(stage.shares.get(name, 0), abs=0.02)
    assert stage_of(STAGES, 49) is STAGES[0]
    assert stage_of(STAGES, 50) is STAGES[1]


def test_a_sequence_depends_on_its_number_alone(tokenizer: Any) -> None:
    first, second = made(tokenizer, start_id=0), made(tokenizer, start_id=0)
    backwards = [second[number] for number in reversed(range(250))][::-1]
    for number, other in enumerate(backwards):
        one = first[number]
        assert one["domain"] == other["domain"]
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["position_ids"], other["position_ids"])
        assert (one["position_ids"][one["input_ids"] == 0] == 0).all()
    windows = [tuple(one["input_ids"].tolist()) for one in backwards if one["domain"] == 0]
    # An epoch of a domain repeats no window.
    assert len(set(windows[:50])) == 50
    assert collate(backwards[:3])["position_ids"].shape == (3, LENGTH)


def test_tasks_are_those_of_the_stage(tokenizer: Any) -> None:
    data = made(tokenizer)
    rows = [data[number]["input_ids"] for number in range(200) if data[number]["domain"] == 2]
    text = " ".join(tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    assert "+" in text
    assert not any(sign in text for sign in ("×", "÷"))


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([{"shares": {"code": 0.5}}], "must sum to 1"),
        ([{"shares": {"code": 1.0}, "until": 5}], "the last has none"),
        ([{"shares": {"code": 1.0}}, {"shares": {"code": 1.0}}], "a later step in until"),
        ([{"shares": {"code": 1.0}, "tasks": {"adition": 1}}], "did you mean 'addition'"),
        ([{"shares": {"code": "half"}}], "must be of type dict"),
        ([{"shares": {"code": 1.0}, "largest": 3}], "largest of a stage must be in"),
        ([{"share": {"code": 1.0}}], "did you mean 'shares'"),
        ([3], "must hold keys and values"),
        ([{}], "needs shares"),
    ],
)
def test_a_wrong_stage_is_named(stages: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        build_config({"data": {"stages": stages}})


def test_a_share_of_no_domain_is_named(tokenizer: Any) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'prose'"):
        made(tokenizer, stages=(Stage(shares={"prosa": 1.0}),))
    with pytest.raises(SettingError, match="domains or a text"):
        build_config({"data": {"domains": []}})


def test_stages_are_part_of_what_a_training_is() -> None:
    one, two = (
        build_config({"data": {"stages": [{"shares": {"code": 1.0}, "largest": largest}]}}).to_dict()
        for largest in (9, 10)
    )
    assert differences(one, two) == ["data.stages"]
