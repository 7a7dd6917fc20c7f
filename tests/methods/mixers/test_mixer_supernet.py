"""What the mixer supernet promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.errors import SettingError
from mixtura.methods.mixers.supernet import Supernet
from mixtura.modeling.layer import ExpertMatrices, Experts
from mixtura.types import LayerShape, RouterInput

SHAPE = LayerShape(d_model=8, d_expert=6, num_experts=3)


def tokens() -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def sliced(width: int, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The first hidden features of one set of weights, on all tokens."""
    halves = torch.cat([gate_up[:width], gate_up[6 : 6 + width]])[None]
    everyone = torch.arange(5)
    return ExpertMatrices(halves, down[None, :, :width]).run(tokens(), everyone, torch.zeros_like(everyone))


@pytest.mark.parametrize("by", ["layer", "neuron"])
@pytest.mark.parametrize("width", [2, 6])
def test_equal_sets_are_a_plain_slice(by: str, width: int) -> None:
    one = Experts(LayerShape(8, 6, 1)).matrices
    alike = ExpertMatrices(one.gate_up.repeat(3, 1, 1), one.down.repeat(3, 1, 1))
    mixer = Supernet(SHAPE, width=width, by=by)  # type: ignore[arg-type]
    output, _ = mixer(RouterInput.of(tokens()), alike)
    torch.testing.assert_close(output, sliced(width, one.gate_up[0], one.down[0]))


def test_all_probability_on_one_set_is_that_set() -> None:
    experts, mixer = Experts(SHAPE).matrices, Supernet(SHAPE, width=4)
    with torch.no_grad():
        mixer.hidden_bias.fill_(1.0)
        mixer.up_rows.zero_()[1].fill_(10.0)
    output, routing = mixer(RouterInput.of(tokens()), experts)
    torch.testing.assert_close(output, sliced(4, experts.gate_up[1], experts.down[1]))
    assert routing.scores[0].tolist() == pytest.approx([0, 1, 0])


def test_widths_are_drawn_in_training_alone() -> None:
    experts, mixer = Experts(SHAPE).matrices, Supernet(SHAPE, widths=[1, 3, 6])
    generator = torch.Generator().manual_seed(0)
    seen = {
        round(mixer(RouterInput.of(tokens(), training=True, generator=generator), experts)[0].sum().item(), 4)
        for _ in range(30)
    }
    assert len(seen) == 3
    quiet = {mixer(RouterInput.of(tokens(), generator=generator), experts)[0].sum().item() for _ in range(5)}
    assert len(quiet) == 1


def test_experts_without_a_gate_are_mixed_by_neuron_too() -> None:
    up, down = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(1))
    plain = ExpertMatrices(up, down.transpose(1, 2), activation=torch.relu, gated=False)
    output, _ = Supernet(SHAPE, by="neuron", width=2)(RouterInput.of(tokens()), plain)
    assert output.shape == (5, 8)


@pytest.mark.parametrize("settings", [{"width": 7}, {"widths": [0, 3]}])
def test_widths_that_do_not_fit_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=r"width and widths of Supernet must be in \[1, 6\]"):
        Supernet(SHAPE, **settings)  # type: ignore[arg-type]
