"""Trainings whose shares a data mixer decides: what is read, what is measured, stopping and going on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train.train_runs import finish, kill_when, start, write_config

from mixtura.errors import CheckpointError, UnmetError, UserError
from mixtura.modeling.family import MixturaConfig, MixturaForCausalLM
from mixtura.train.config import build_config, read_config
from mixtura.train.mixing import MixedSequences, Mixture, held_out_losses
from mixtura.train.run import train

LENGTH, PER_STEP = 8, 4
# Of every checkpoint of this training some lie in a round's sweeps and some behind them.
AIOLI = "mixture={name: aioli, every: 5, sweeps: 1, probe_steps: 1, held_out: 4}"


def made(mixture: Any = "uniform", num_steps: int = 60, held_out: int = 3) -> MixedSequences:
    """Two domains whose tokens say where they stood."""
    streams = {"low": np.arange(1000), "high": np.arange(5000, 7000)}
    read = Mixture.read({"name": mixture, "held_out": held_out, "every": 20})
    return MixedSequences(
        streams, read, num_sequences=num_steps * PER_STEP, per_step=PER_STEP, length=LENGTH, seed=3
    )


def two_domains(folder: Path, **training: Any) -> list[str]:
    """A configuration, and changes that mix a text of two folders in it."""
    for name, line in (("one", "line {} holds {} and words\n"), ("two", "other text {1} is here {0}\n")):
        (folder / "mixed" / name).mkdir(parents=True)
        text = "".join(line.format(n, n * n % 97) for n in range(600))
        (folder / "mixed" / name / "text.txt").write_text(text)
    changes = [f"text={folder / 'mixed'}", AIOLI]
    return [str(write_config(folder, **training)), *(part for one in changes for part in ("--set", one))]


def weights(run: Path) -> dict[str, torch.Tensor]:
    read: dict[str, torch.Tensor] = load_file(run / "model/model.safetensors")
    return read


def assert_same(one: Path, two: Path) -> None:
    """Two trainings have the same weights, and noted the same decisions."""
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    mixtures = [
        [json.loads(line)["mixture"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, two)
    ]
    assert mixtures[0] == mixtures[1]
    assert len({json.dumps(line) for line in mixtures[0]}) > 2


def test_each_stretch_keeps_its_shares_and_no_held_out_text_is_read() -> None:
    data = made("proportional")
    data.decide(torch.ones(2))
    share = (1000 - 24) / (3000 - 48)
    assert data.num_decided == 20
    assert data.described()["low"] == {"share": pytest.approx(share, abs=1e-6), "held_out": 1.0}
    while data.num_decided < 60:
        data.decide(torch.ones(2))
    batch = data.batch(range(len(data)))
    low = batch["token_labels"]["domain"] == 0
    assert float(low.double().mean()) == pytest.approx(share, abs=0.02)
    assert torch.equal(batch["input_ids"][:, 0] < 5000, low)
    held = {int(token) for place in (0, 1) for one in data.held_out(place) for token in one["input_ids"]}
    assert held == {*range(976, 1000), *range(6976, 7000)}
    assert not held & {*batch["input_ids"].flatten().tolist()}
    rows = batch["input_ids"][low][:, 0].tolist()
    # An epoch of a domain repeats no window.
    assert len({*rows[:50]}) == 50


def test_a_stretch_ends_with_the_training() -> None:
    data = made(num_steps=30)
    data.decide(torch.ones(2))
    data.decide(torch.ones(2))
    assert [one.num_steps for one in data.stretches] == [20, 10]


def test_decisions_are_kept_to_the_last_bit(tmp_path: Path) -> None:
    settings = {"name": "aioli", "every": 20, "held_out": 3, "sweeps": 1}
    streams = {"low": np.arange(1000), "high": np.arange(5000, 7000)}
    whole, again = (
        MixedSequences(streams, Mixture.read(settings), num_sequences=400, per_step=4, length=8)
        for _ in range(2)
    )
    losses = torch.rand(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for number, one in enumerate(losses):
        whole.decide(one)
        if number == 4:
            whole.save(tmp_path)
            again.load(tmp_path)
        elif number > 4:
            again.decide(one)
    assert whole.described() == again.described()
    for one, other in zip(whole.stretches, again.stretches, strict=True):
        assert torch.equal(one.weights, other.weights)
    numbers = range(whole.num_decided * 4)
    assert torch.equal(whole.batch(numbers)["input_ids"], again.batch(numbers)["input_ids"])


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "mixture.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"mixture\.safetensors cannot be read"):
        made().load(tmp_path)


def test_a_loss_that_is_no_number_ends_the_training() -> None:
    with pytest.raises(UnmetError, match="held-out loss of high is not finite after 0 steps"):
        made().decide(torch.tensor([1.0, torch.nan]))


def test_losses_are_those_of_each_sequence_read_alone() -> None:
    config = MixturaConfig(
        vocab_size=7000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, attention_dropout=0.5,
        moe={"router": {"name": "noisy_top_k", "top_k": 1}, "num_experts": 4, "d_expert": 8},
    )  # fmt: skip
    model, data = MixturaForCausalLM(config).train(), made()
    before = torch.get_rng_state()
    found = held_out_losses(model, data, 2, "cpu")
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    model.eval()
    for place in range(2):
        total = []
        for one in data.held_out(place):
            ids = one["input_ids"]
            with torch.no_grad():
                scores = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            total += [-float(scores[at, ids[at + 1]]) for at in range(LENGTH - 1)]
        assert float(found[place]) == pytest.approx(sum(total) / len(total), rel=1e-5)


def test_a_resumed_training_is_the_same(tmp_path: Path) -> None:
    config, *changes = two_domains(tmp_path)
    read = read_config(config, changes[1::2])
    train(read, tmp_path / "whole", progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoint-12")
    shutil.rmtree(tmp_path / "resumed/model")
    assert train(read, tmp_path / "resumed", progress=False).resumed_from == 9
    assert_same(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same(tmp_path: Path) -> None:
    config = two_domains(tmp_path)
    code, _, err = finish(start(*config, "--out", str(tmp_path / "whole")))
    assert code == 0, err
    killed = tmp_path / "killed"
    kill_when(start(*config, "--out", str(killed)), killed / "checkpoint-6")
    code, _, err = finish(start(*config, "--out", str(killed)))
    assert code == 0, err
    assert_same(tmp_path / "whole", killed)


@pytest.mark.slow
def test_two_processes_decide_and_resume_together(tmp_path: Path) -> None:
    config = two_domains(tmp_path)
    code, _, err = finish(start(*config, "--out", str(tmp_path / "whole"), processes=2))
    assert code == 0, err
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoint-12")
    shutil.rmtree(tmp_path / "resumed/model")
    code, _, err = finish(start(*config, "--out", str(tmp_path / "resumed"), processes=2))
    assert code == 0, err
    assert_same(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"mixture": "ailoi"}, "no data mixer named 'ailoi'; did you mean 'aioli'"),
        ({"mixture": 3}, "mixture of data must be of type"),
        ({"mixture": {"every": 5}}, "a mixture is written as a name or as a mapping with a name"),
        ({"mixture": {"name": "aioli", "etta": 1}}, "Aioli has no setting 'etta'; did you mean 'eta'"),
        ({"mixture": {"name": "aioli", "eta": -1}}, "eta of Aioli must be in"),
        ({"mixture": {"name": "uniform", "every": 0}}, "every of mixture must be in"),
        ({"mixture": {"name": "uniform", "held_out": 2.5}}, "held_out of mixture must be a whole number"),
        ({"mixture": "uniform", "domains": ["code"]}, "at least two domains, got code"),
        ({"mixture": "uniform", "stages": [{"shares": {"code": 1.0}}]}, "leave one of them out"),
    ],
)
def test_a_wrong_mixture_is_named(data: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build_config({"data": data})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("mixture.held_out=1000", "of which a mixture would hold out 32000; give more text"),
        ("mixture.sweeps=9", "the sweeps of Aioli take 18 steps, but a round has 5"),
        ("mixture={name: dmt, general: three}", "Dmt needs a domain named 'three'"),
        ("text=TEXT/one", "at least two domains, but the text has only"),
    ],
)
def test_text_that_cannot_be_mixed_is_refused_before_anything_is_written(
    change: str, says: str, tmp_path: Path
) -> None:
    config, *changes = two_domains(tmp_path)
    change = change.replace("TEXT", str(tmp_path / "mixed"))
    with pytest.raises(UserError, match=says):
        train(read_config(config, [*changes[1::2], change]), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_mixture_is_set_by_name_and_by_setting(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    read = read_config(file, ["mixture=aioli", "mixture.eta=0.1", "mixer=smear"])
    assert read.data.mixture == {"name": "aioli", "eta": 0.1}
    assert read.model["moe"]["mixer"] == "smear"
