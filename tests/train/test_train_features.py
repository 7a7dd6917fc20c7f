"""What a training may ask for besides steps: a teacher, rehearsal, spikes left out, a normed head."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.tiny_models import some_ids, tiny_model
from safetensors.torch import load_file
from torch.nn import functional as F
from train.train_runs import write_config
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mixtura.cli import build_app
from mixtura.errors import CheckpointError, SettingError, UserError
from mixtura.modeling.family import MixturaForCausalLM, export
from mixtura.train.config import build_config, read_config, read_yaml
from mixtura.train.features import SpikeGuard, Teacher, teaching_loss
from mixtura.train.run import train
from mixtura.train.stages import Stage, rehearsed


def test_teaching_is_the_divergence_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 4, 5, generator=generator) for _ in range(2))
    labels = torch.tensor([[1, 2, -100, 3], [0, 1, 1, -100]])
    total, count = 0.0, 0
    for row in range(2):
        for place in range(3):
            if labels[row, place + 1] == -100:
                continue
            told, said = ((one[row, place].double() / 3.0).softmax(-1) for one in (teacher, student))
            total += sum(float(p * (p / q).log()) for p, q in zip(told, said, strict=True))
            count += 1
    found = teaching_loss(student, teacher, labels, 3.0)
    assert float(found) == pytest.approx(9 * total / count, rel=1e-5)
    assert float(teaching_loss(student, teacher, labels, 3.0, num_items=2 * count)) == pytest.approx(
        float(found) / 2, rel=1e-5
    )
    assert float(teaching_loss(student, student, labels, 3.0)) == pytest.approx(0, abs=1e-6)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/model.safetensors")


def small(folder: Path, **training: Any) -> Any:
    steps = {"num_steps": 4, "warmup_steps": 1, "decay_steps": 1, "save_steps": 2, "num_accumulated": 2}
    return build_config(read_yaml(write_config(folder, **(steps | training))))


def test_a_teacher_changes_what_is_learned_until_it_ends_and_resuming_is_exact(tmp_path: Path) -> None:
    alone = train(small(tmp_path), tmp_path / "alone", progress=False)
    told = {"model": str(alone.model), "coefficient": 2.0, "temperature": 2.0, "until": 3}
    config = small(tmp_path, teacher=told)
    train(config, tmp_path / "taught", progress=False)
    assert any(
        not torch.equal(one, weights(tmp_path / "alone")[n])
        for n, one in weights(tmp_path / "taught").items()
    )
    shutil.copytree(tmp_path / "taught", tmp_path / "again")
    for gone in ("checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "again" / gone)
    assert train(config, tmp_path / "again", progress=False).resumed_from == 2
    for name, one in weights(tmp_path / "taught").items():
        assert torch.equal(one, weights(tmp_path / "again")[name]), name
    # A teacher of coefficient 0, or one that ended, teaches nothing.
    train(small(tmp_path, teacher=told | {"coefficient": 0.0}), tmp_path / "silent", progress=False)
    for name, one in weights(tmp_path / "alone").items():
        assert torch.equal(one, weights(tmp_path / "silent")[name]), name
    other = MixturaForCausalLM.from_pretrained(alone.model)
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    other.save_pretrained(alone.model)
    with pytest.raises(CheckpointError, match="began with a teacher of other weights"):
        train(config, tmp_path / "again", progress=False)


def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no directory of a model with weights in safetensors"):
        train(small(tmp_path, teacher={"model": str(tmp_path)}), tmp_path / "run", progress=False)
    tiny_model().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="has a vocabulary of 64, the model one of"):
        train(small(tmp_path, teacher={"model": str(tmp_path / "other")}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(SettingError, match="temperature of teacher must be in"):
        Teacher(model="x", temperature=0.0)
    with pytest.raises(UserError, match="did you mean 'temperature'"):
        read_config(write_config(tmp_path), ["teacher={model: x, temperatur: 2}"])
    assert read_config(write_config(tmp_path), ["teacher=null"]).training.teacher is None


def test_leaps_are_told_from_noise_by_hand() -> None:
    guard = SpikeGuard(4.0)
    losses = [3.0 + 0.1 * math.sin(n) for n in range(40)]
    assert not any(guard.leaps(one) for one in losses)
    mean, spread = sum(losses) / 40, (sum(x * x for x in losses) / 40 - (sum(losses) / 40) ** 2) ** 0.5
    assert guard.mean == pytest.approx(mean)
    assert math.sqrt(guard.variance) == pytest.approx(spread, rel=1e-6)
    assert not SpikeGuard(**guard.to_dict()).leaps(mean + 3.9 * spread)
    assert SpikeGuard(**guard.to_dict()).leaps(mean + 4.1 * spread)
    # A loss that stays high is believed after three steps.
    assert [guard.leaps(9.0) for _ in range(4)] == [True, True, True, False]
    # One that is no number never is, as it would make every weight one.
    assert all(guard.leaps(math.nan) for _ in range(5))
    assert (guard.num_skipped, guard.num_seen) == (8, 41)
    assert not SpikeGuard(4.0).leaps(1e9)  # nothing is known at first


def test_a_step_that_leaps_changes_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpikeGuard, "_LEAST", 1)
    monkeypatch.setattr(SpikeGuard, "leaps", _every_step_after(SpikeGuard.leaps, 2))
    skipping = small(tmp_path, skip_spikes=1e5, decay_steps=0)
    train(skipping, tmp_path / "skips", progress=False)
    two = load_file(tmp_path / "skips/checkpoint-2/model.safetensors")
    four = load_file(tmp_path / "skips/checkpoint-4/model.safetensors")
    for name, one in two.items():
        assert "balance" in name or torch.equal(one, four[name]), name
    assert json.loads((tmp_path / "skips/metrics.jsonl").read_text().splitlines()[-1])["skipped_steps"] == 2
    shutil.copytree(tmp_path / "skips", tmp_path / "again")
    for gone in ("checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "again" / gone)
    train(skipping, tmp_path / "again", progress=False)
    kept = [(tmp_path / run / "checkpoint-4/spikes.json").read_text() for run in ("skips", "again")]
    assert kept[0] == kept[1]
    for name, one in weights(tmp_path / "skips").items():
        assert torch.equal(one, weights(tmp_path / "again")[name]), name


def _every_step_after(leaps: Any, num: int) -> Any:
    """A guard for which every loss after the first few is far too high."""

    def judged(guard: SpikeGuard, loss: float) -> bool:
        found: bool = leaps(guard, loss if guard.num_seen < num else 1e6)
        return found

    return judged


def test_rehearsal_has_its_share_exactly() -> None:
    first = Stage(shares={"code": 0.75, "tasks": 0.25}, until=100)
    _, second, third = rehearsed(
        [
            first,
            Stage(shares={"prose": 1.0}, rehearsal=0.25, until=300),
            Stage(shares={"prose": 1.0}, rehearsal=0.1),
        ],
        400,
    )
    # 25 of the second stage's 200 steps are the first's; 30 of the third's 100 are the first two's.
    assert second.shares == pytest.approx({"prose": 175 / 200, "code": 0.75 / 8, "tasks": 0.25 / 8})
    code, tasks = 75 + 200 * 0.75 / 8, 25 + 200 * 0.25 / 8
    wanted = {"prose": 0.7 + 0.3 * 175 / 300, "code": 0.3 * code / 300, "tasks": 0.3 * tasks / 300}
    assert third.shares == pytest.approx(wanted)
    plain = [first, Stage(shares={"prose": 1.0})]
    assert rehearsed(plain, 300) == tuple(plain)
    with pytest.raises(SettingError, match="the first stage has nothing to rehearse"):
        rehearsed([Stage(shares={"code": 1.0}, rehearsal=0.5)], 10)
    with pytest.raises(SettingError, match="takes 100 steps, but its stage has 50"):
        rehearsed([first, Stage(shares={"prose": 1.0}, rehearsal=1.0)], 150)


def test_a_rehearsal_that_does_not_fit_is_refused_where_it_is_written() -> None:
    stages = [{"shares": {"code": 1.0}, "until": 90}, {"shares": {"prose": 1.0}, "rehearsal": 0.5}]
    values = {"data": {"stages": stages}, "training": {"num_steps": 100, "warmup_steps": 0, "decay_steps": 0}}
    with pytest.raises(SettingError, match="takes 45 steps, but its stage has 10"):
        build_config(values)


@pytest.mark.parametrize("tied", [True, False])
def test_a_normed_head_is_exported_folded(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(query_key_norm="none", normed_head=True, tie_word_embeddings=tied)
    ids = some_ids()
    hidden = model.model(ids).last_hidden_state
    matrix = model.lm_head.weight
    normed = torch.stack([column / column.norm() for column in matrix.T], dim=1)
    torch.testing.assert_close(model(ids).logits, F.linear(hidden, normed), rtol=1e-4, atol=1e-5)
    assert export(model, tmp_path / "out") == "mixtral"
    ordinary = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(ordinary(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "own")(ids).logits, model(ids).logits)


def test_a_training_begins_with_a_model_that_there_is(tmp_path: Path) -> None:
    first = train(small(tmp_path), tmp_path / "first", progress=False)
    values = read_yaml(write_config(tmp_path, num_steps=4, warmup_steps=1, decay_steps=1, save_steps=2))
    values.pop("model")
    values["training"]["start"] = str(first.model)
    config = build_config(values)
    train(config, tmp_path / "then", progress=False)
    begun, ended = weights(tmp_path / "first"), weights(tmp_path / "then")
    assert begun.keys() == ended.keys()
    moved = [float((ended[name] - one).norm() / one.norm()) for name, one in begun.items() if one.ndim > 1]
    # Weights that were drawn anew would be about 1.4 away.
    assert 0 < sorted(moved)[len(moved) // 2] < 0.5
    # Resumed it ends with the same weights; with other weights at the start it is another training.
    shutil.copytree(tmp_path / "then", tmp_path / "again")
    for gone in ("checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "again" / gone)
    assert train(config, tmp_path / "again", progress=False).resumed_from == 2
    assert all(torch.equal(one, weights(tmp_path / "again")[name]) for name, one in ended.items())
    other = MixturaForCausalLM.from_pretrained(first.model)
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    other.save_pretrained(first.model)
    with pytest.raises(CheckpointError, match="began with a model of other weights"):
        train(config, tmp_path / "again", progress=False)


def test_a_model_that_no_training_can_begin_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="leave out model"):
        small(tmp_path, start="there")
    values = read_yaml(write_config(tmp_path))
    values.pop("model")
    values["training"]["start"] = str(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        train(build_config(values), tmp_path / "run", progress=False)
    ordinary = tmp_path / "ordinary"
    export(tiny_model(attention_bias=False), ordinary)
    values["training"]["start"] = str(ordinary)
    with pytest.raises(UserError, match="begins with models of mixtura's own"):
        train(build_config(values), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_command_begins_with_a_model_without_a_file(tmp_path: Path) -> None:
    first = train(small(tmp_path), tmp_path / "first", progress=False)
    steps = ("num_steps=1", "warmup_steps=0", "decay_steps=0", "num_sequences=1", "sequence_length=16")
    asked = [part for one in (*steps, "domains=[tasks]", f"start={first.model}") for part in ("--set", one)]
    done = CliRunner().invoke(build_app(), ["train", *asked, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert weights(tmp_path / "run").keys() == weights(tmp_path / "first").keys()
