"""What the decoder rice promises beyond its kind's contract."""

from __future__ import annotations

import math

import pytest
import torch

from mixtura.authoring.contracts._decoded import model, sample_prompt, tokenizer
from mixtura.errors import UserError
from mixtura.methods.decoders import Calibration
from mixtura.methods.decoders.rice import Rice, npmi
from mixtura.running.decoders.calibrating import calibrate_on


def by_definition(both: float, one: float, other: float) -> float:
    return math.log2(both / (one * other)) / -math.log2(both)


def test_npmi_is_as_defined() -> None:
    # 20 tokens, 5 of the class; experts active on 8, 5, 4, 20 tokens, with the class on 2, 5, 0, 5 of them.
    found = npmi(torch.tensor([2.0, 5.0, 0.0, 5.0]), torch.tensor([8.0, 5.0, 4.0, 20.0]), 5.0, 20.0).tolist()
    expected = [by_definition(0.1, 0.4, 0.25), 1.0, -1.0, 0.0]
    assert found == pytest.approx(expected)


def test_a_planted_expert_is_found() -> None:
    ids = tokenizer().encode("ab", add_special_tokens=False)
    made = calibrate_on(
        model(), Rice(top=1, thinking=[ids[0]]), [("", "abababcdefab", "x")], tokenizer=tokenizer()
    )
    ((layer, expert),) = made.values["experts"]
    text = torch.tensor([tokenizer().encode("abababcdefab", add_special_tokens=False)])
    chosen: list[torch.Tensor] = []
    hooks = [
        one.mlp.gate.register_forward_hook(lambda gate, given, out: chosen.append(out[2]))
        for one in model().model.layers
    ]
    with torch.no_grad():
        model()(text)
    for hook in hooks:
        hook.remove()
    marked = text[0] == ids[0]
    best = max(
        by_definition(both / 12, float(active.sum()) / 12, float(marked.sum()) / 12)
        for layers in chosen
        for e in range(8)
        if (both := float(((active := (layers == e).any(-1)) & marked).sum())) > 0
    )
    assert made.values["npmi"] == pytest.approx([best])
    assert (chosen[layer] == expert).any()


def test_texts_of_one_class_are_refused() -> None:
    with pytest.raises(UserError, match="some tokens are of the class and some are not"):
        calibrate_on(model(), Rice(thinking=[65]), [("", "abc", "x")], tokenizer=tokenizer())


def test_only_the_weights_of_those_experts_are_multiplied() -> None:
    found = Calibration(method="rice", mark="", values={"experts": [[1, 3]]})
    view = Rice(factor=8.0).open(sample_prompt(calibration=found))[0].views[0]
    assert list(view.steering) == [1]
    assert view.steering[1].given == ("scale",)
    assert view.steering[1].scale is not None
    assert view.steering[1].scale.tolist() == [1, 1, 1, 8, 1, 1, 1, 1]
