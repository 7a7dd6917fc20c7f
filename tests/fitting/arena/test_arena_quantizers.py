"""The arena of quantizers: who takes part at which size, what is measured, the tables, and a contest."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import run_mixtura, save_tiny

from mixtura.checkpoints.view import MemoryView
from mixtura.errors import SettingError, UnknownNameError, UserError
from mixtura.fitting.arena.exam import Sizes
from mixtura.fitting.arena.rounding.entries import REFERENCE, Entry, entries
from mixtura.fitting.arena.rounding.measured import RoundingExam
from mixtura.fitting.arena.rounding.run import Contest
from mixtura.fitting.arena.rounding.standings import standings
from mixtura.methods import create, names

SMALL = Sizes(length=48, held_out_tokens=400, tasks=1, prompts=1, prompt_tokens=4, new_tokens=4)
MATRICES = [(256, 256), (256, 128)]


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> RoundingExam:
    folder = tmp_path_factory.mktemp("arena")
    return RoundingExam(save_tiny(folder / "tiny"), folder / "runs", SMALL, 300, seed=1)


def entry(name: str, **settings: Any) -> Entry:
    return Entry(name=name, settings=settings, rung=9.0, bits=float(settings["bits"]))


def test_everyone_takes_the_most_bits_that_the_room_has() -> None:
    found = entries((), MATRICES, (2.25, 4.25, 8.25))
    assert {one.name for one in found if one.rung == 4.25} == set(names("quantizers"))
    for one in found:
        taken = sum(one.quantizer().num_bytes(*size) for size in MATRICES)
        assert one.bits == pytest.approx(8 * taken / sum(rows * cols for rows, cols in MATRICES))
        assert one.bits <= one.rung
    chosen = {(one.name, one.rung): dict(one.settings) for one in found}
    assert chosen["gptq", 4.25] == {"bits": 4, "group_size": 64}
    assert chosen["gptq", 2.25] == {"bits": 2, "group_size": 64}
    assert chosen["trellis", 8.25]["bits"] == 6
    # The baseline has nothing of one bit, and what cannot be compared does not take part.
    assert {one.rung for one in entries((), MATRICES, (1.5, 4.25))} == {4.25}
    with pytest.raises(UserError, match=r"nothing of 1\.5 bits or less"):
        entries((), MATRICES, (0.5, 1.5))
    assert {one.name for one in entries(("gptq",), MATRICES)} == {"gptq", REFERENCE}
    with pytest.raises(UnknownNameError, match="did you mean 'gptq'"):
        entries(("gtpq",), MATRICES)


@torch.no_grad()
def test_the_loss_is_that_of_a_model_whose_experts_were_rounded(exam: RoundingExam) -> None:
    found = exam.measure(entry(REFERENCE, bits=2, group_size=16))
    model: Any = exam._exam.model
    rounded = copy.deepcopy(model)
    quantizer = create("quantizers", REFERENCE, bits=2, group_size=16)
    for layer in MemoryView(rounded).layers:
        for number in range(layer.num_experts):
            for matrix in layer.native_expert(number)[:2]:
                matrix.copy_(quantizer.decode(quantizer.encode(matrix)))
    total, count = 0.0, 0
    for part in exam._exam._held_out:
        for ids, predicted in zip(part.input_ids, part.predicted, strict=True):
            pair = [one(input_ids=ids[None], use_cache=False).logits[0] for one in (model, rounded)]
            before, after = (one.log_softmax(-1)[predicted] for one in pair)
            total += float((before.exp() * (before - after)).sum())
            count += int(predicted.sum())
    assert found["kl"] == pytest.approx(total / count, rel=1e-3)
    assert found["kl"] > 0


def test_calibration_lessens_what_outputs_lose(exam: RoundingExam) -> None:
    plain = exam.measure(entry(REFERENCE, bits=2, group_size=16))
    calibrated = exam.measure(entry("gptq", bits=2, group_size=16))
    fine = exam.measure(entry(REFERENCE, bits=8, group_size=16))
    assert fine["output_error"] < calibrated["output_error"] < plain["output_error"]
    assert 0 < plain["output_error"] < 1


def test_what_was_measured_is_kept(exam: RoundingExam, monkeypatch: pytest.MonkeyPatch) -> None:
    one = entry(REFERENCE, bits=4, group_size=16)
    assert not exam.is_known(one)
    found = exam.measure(one)
    assert exam.is_known(one)
    monkeypatch.setattr(exam, "_measure", lambda _: pytest.fail("it is measured again"))
    assert exam.measure(one) == found


def row(name: str, seed: int, kl: float, rung: float = 4.25) -> dict[str, Any]:
    told = {"name": name, "rung": rung, "settings": "bits 4", "seed": seed, "kl": kl}
    return {**told, "equal_top": 0.9, "perplexity": 20.0, "output_error": 0.01, "bits": 4.2}


def test_standings_compare_with_the_baseline_on_the_same_text() -> None:
    rows = [row(REFERENCE, seed, kl) for seed, kl in enumerate((0.010, 0.020, 0.040))]
    rows += [row("good", seed, kl) for seed, kl in enumerate((0.005, 0.011, 0.019))]
    rows += [row("alike", seed, kl) for seed, kl in enumerate((0.011, 0.018, 0.042))]
    rows += [row("good", 0, 0.1, 2.25), row(REFERENCE, 0, 0.1, 2.25)]
    table = {(one.rung, one.name): one for one in standings(rows)}
    assert next(one.name for one in standings(rows) if one.rung == 4.25) == "good"
    good = table[4.25, "good"]
    assert good.ratio == pytest.approx(math.exp(sum(map(math.log, (0.5, 0.55, 0.475))) / 3))
    assert (good.verdict, table[4.25, "alike"].verdict) == ("better", "not separated")
    assert table[4.25, REFERENCE].verdict == "reference"
    assert table[4.25, REFERENCE].baseline
    assert table[2.25, "good"].half_width is None
    assert table[2.25, "good"].verdict == "not separated"


def test_settings_out_of_range() -> None:
    with pytest.raises(SettingError, match="seeds"):
        Contest(num_seeds=0)
    with pytest.raises(SettingError, match="tokens of the arena must be at least 64, got 5"):
        Contest(num_tokens=5)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    tiny = save_tiny(tmp_path / "tiny")
    places = ("--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--model", str(tiny))
    words = ("arena", "quantizers", "--only", "gptq", "--seeds", "1", "--tokens", "300", *places)
    done = run_mixtura(*words)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out/quantizers.md").read_text()
    assert page.startswith("# The arena: quantizers")
    assert "`gptq`" in page
    with (tmp_path / "out/quantizers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {one["name"] for one in rows} == {"gptq", REFERENCE}
    assert all(float(one["kl"]) > 0 for one in rows)
    assert (tmp_path / "out/quantizers.svg").read_text().startswith("<svg")
    again = run_mixtura(*words)
    assert again.returncode == 0
    assert "seed 0" in done.stderr
    assert "seed 0" not in again.stderr
