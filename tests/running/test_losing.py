"""What leaving experts out loses, beside the model as it is on the same text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import run_mixtura

from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.errors import SettingError, UserError
from mixtura.methods import create
from mixtura.running.decoders.calibrating import calibrate_on
from mixtura.running.decoders.probing import save_calibration
from mixtura.running.loading import load
from mixtura.running.losing import _texts, measure_loss
from mixtura.running.resolve import resolve_model
from mixtura.running.tiers.opening import Wish

SPECIMEN = resolve_model(None).path
SAMPLES = (("What is 17 + 28?", " 45", ""), ("sort: 3 1 2", " 1 2 3", ""))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("online") / "made.safetensors"
    made = calibrate_on(
        load(SPECIMEN), create("decoders", "online_pruning"), SAMPLES, tokenizer=load_tokenizer(SPECIMEN)
    )
    save_calibration(made, path)
    return str(path)


def test_nothing_left_out_is_nothing_lost(calibration: str) -> None:
    decoder = create("decoders", "online_pruning", part=0.0)
    found = measure_loss(SPECIMEN, None, [decoder], calibrations=[calibration], num_tokens=16)
    assert (found.divergence, found.left_out, found.same_choice) == (0.0, 0.0, 1.0)
    assert found.nats[0] == found.nats[1]
    # The texts' likelihood by one pass of the model alone.
    model, ids = load(SPECIMEN), _texts(load(SPECIMEN), load_tokenizer(SPECIMEN), 4)
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits[:, 3:-1].float().log_softmax(-1)
    nats = -logits.gather(-1, torch.tensor(ids)[:, 4:, None]).mean()
    assert found.nats[0] == pytest.approx(float(nats), rel=1e-3)


def test_more_left_out_is_more_lost_and_less_read(calibration: str) -> None:
    made = [
        measure_loss(
            SPECIMEN,
            Wish(pool_slots=40),
            [create("decoders", "online_pruning", part=1.0, scale=scale)],
            calibrations=[calibration],
            num_tokens=32,
        )
        for scale in (0.5, 1.5)
    ]
    assert 0 < made[0].left_out < made[1].left_out < 1
    assert 0 < made[0].divergence < made[1].divergence < made[1].largest_divergence
    assert made[1].read_bytes[1] < made[1].read_bytes[0]
    assert made[1].read_bytes[1] < made[0].read_bytes[1]


def test_calibrated_within_memory_as_in_all_of_it(tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    asked = [(f"What is {n} + {2 * n}? Say the sum alone.", f" {3 * n}") for n in range(3, 9)]
    records.write_text("".join(json.dumps({"prompt": q, "answer": a}) + "\n" for q, a in asked))
    made = []
    for name, more in (("whole", ()), ("within", ("--memory", "8GiB"))):
        arguments = ("calibrate", "online_pruning", "--text", str(records), "--json", *more)
        done = run_mixtura(*arguments, "--out", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        made.append(json.loads(done.stdout)["values"])
    assert made[0] == made[1]
    assert run_mixtura(*arguments[:-1], "1MiB", "--out", str(tmp_path / "small")).returncode == 3


def test_what_cannot_be_measured_so_is_said() -> None:
    with pytest.raises(UserError, match=r"Scmoe does more than choose experts \(mix\)"):
        measure_loss(SPECIMEN, None, [create("decoders", "scmoe")])
    with pytest.raises(SettingError, match="at least 16 tokens"):
        measure_loss(SPECIMEN, None, [create("decoders", "mask_experts")], num_tokens=3)


def test_the_command_says_it(calibration: str, tmp_path: Path) -> None:
    arguments = ("verify", "--memory", "8GiB", "--tokens", "16", "--decoder", "online_pruning")
    done = run_mixtura(*arguments, "--calibration", calibration, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["num_tokens"] == 16
    assert 0 < found["left_out"] < 0.2
    done = run_mixtura(*arguments)
    assert done.returncode == 2
    assert "mixtura calibrate" in done.stderr
    done = run_mixtura(*arguments, "--calibration", str(tmp_path / "none"))
    assert done.returncode == 2
    assert "there is no file" in done.stderr
