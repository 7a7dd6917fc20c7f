"""What the decoder modes promises beyond its kind's contract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixtura.authoring.contracts._decoded import model, samples, tokenizer
from mixtura.errors import CheckpointError, UserError
from mixtura.methods.decoders._shared import answer_divergence, largest_that_leaves
from mixtura.methods.decoders.modes import Modes
from mixtura.methods.decoders.scmoe import Scmoe
from mixtura.running.decoders.calibrating import calibrate_on
from mixtura.running.decoders.entry import decode
from mixtura.running.decoders.probing import save_calibration


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("modes") / "modes.safetensors"
    save_calibration(calibrate_on(model(), Modes(skip=0.4), samples(), tokenizer=tokenizer()), path)
    return path


def test_importance_is_a_share_and_the_threshold_leaves_out_what_was_asked() -> None:
    made = calibrate_on(model(), Modes(skip=0.4), samples(), tokenizer=tokenizer()).values
    assert sum(made["importance"]) == pytest.approx(1)
    assert min(made["importance"]) > 0
    assert made["left_out"] == pytest.approx(0.4, abs=0.05)
    assert made["divergence"] > 0


def test_more_experts_are_left_out_as_the_threshold_grows(file: Path) -> None:
    kept = [
        decode(
            model(), tokenizer(), "abcdefgh", Modes(threshold=t), calibration=file, max_new_tokens=1
        ).cost.num_assignments
        for t in (0.0, 0.05, 0.1, 0.2, 10.0)
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 8 * 4 * 2
    assert kept[-1] == 0


def test_divergence_by_hand() -> None:
    first = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    second = torch.tensor([[0.0, float(torch.tensor(3.0).log())], [9.0, 0.0]])
    # Halves against a quarter and three quarters; only the token before the answer counts.
    expected = 0.5 * torch.tensor(0.5 / 0.25).log() + 0.5 * torch.tensor(0.5 / 0.75).log()
    assert answer_divergence(1, first, second) == pytest.approx(float(expected))


def test_another_models_or_methods_calibration_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was made for another model, whose sizes or routers differ"):
        decode(model(1), tokenizer(), "abc", "modes", calibration=file)
    with pytest.raises(UserError, match="was made for modes, not for rice"):
        decode(model(), tokenizer(), "abc", "rice", calibration=file)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="is no calibration that can be read"):
        decode(model(), tokenizer(), "abc", "modes", calibration=broken)
    with pytest.raises(UserError, match="Modes needs a calibration; make one with"):
        decode(model(), tokenizer(), "abc", "modes")
    with pytest.raises(UserError, match="Scmoe needs no calibration"):
        calibrate_on(model(), Scmoe(), samples(), tokenizer=tokenizer())


def test_the_threshold_leaves_at_most_the_part_asked_for() -> None:
    """Counted one by one, also with equals, a few scores and more than a quantile can be taken of."""
    generator = torch.Generator().manual_seed(0)
    for number in (1, 2, 3, 10, 11, 64):
        scores = torch.randint(0, 20, (number,), generator=generator) / 20
        for part in (0.1, 0.3, 0.4, 0.5, 0.99, 1.0):
            found = largest_that_leaves(scores, part)
            assert sum(score < found for score in scores.tolist()) <= part * number
            higher = [score for score in scores.tolist() if score > found]
            if higher and part < 1:
                assert sum(score < min(higher) for score in scores.tolist()) > part * number
    many = torch.rand((1 << 24) + 1, generator=generator)
    assert largest_that_leaves(many, 0.5) == pytest.approx(0.5, abs=1e-3)
