"""What the decoder online_pruning promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.authoring.contracts._decoded import model, samples, tokenizer
from mixtura.authoring.contracts.decoders import sample_prompt
from mixtura.errors import SettingError
from mixtura.methods.decoders import Calibration
from mixtura.methods.decoders.online_pruning import OnlinePruning
from mixtura.running.decoders.bundle import Cost
from mixtura.running.decoders.calibrating import calibrate_on
from mixtura.running.decoders.entry import prepared
from mixtura.running.decoders.probing import ModelProbe


@pytest.fixture(scope="module")
def made() -> Calibration:
    return calibrate_on(model(), OnlinePruning(), samples(), tokenizer=tokenizer())


def test_bounds_are_medians_of_the_lesser_of_two_weights(made: Calibration) -> None:
    least, loss = made.values["least"], made.values["loss"]
    assert len(least) == len(loss) > 1
    assert all(0 < one <= 0.5 for one in least)
    assert all(one >= 0 for one in loss)
    # With two experts a share below the bound is a second weight below a part of the first.
    with prepared(model(), [OnlinePruning()]) as runners:
        probe = ModelProbe(runners[0].model, runners[0].facts, runners[0].steerer, Cost())
        ran = probe.run(list(range(3, 40)))
    for place, layer in enumerate(runners[0].facts.layers):
        first, second = ran.weights[layer.index].float().sort(-1, descending=True).values.T
        bound = least[place] / (1 - least[place])
        assert torch.equal(second < bound * first, second / (first + second) < least[place])


def test_layers_that_bear_it_best_come_first() -> None:
    values = {"least": [0.25, 0.4], "loss": [0.5, 0.1]}
    prompt = sample_prompt(calibration=Calibration(method="online_pruning", mark="", values=values))
    (branch,) = OnlinePruning(part=0.5).open(prompt)
    assert [*branch.views[0].steering] == [1]
    (branch,) = OnlinePruning(part=1.0, scale=0.5).open(prompt)
    found = [float(one.least) for one in branch.views[0].steering.values() if one.least is not None]
    assert found == pytest.approx([0.125, 0.2])


def test_a_part_is_a_part() -> None:
    with pytest.raises(SettingError, match="part"):
        OnlinePruning(part=1.5)
