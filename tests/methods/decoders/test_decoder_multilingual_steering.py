"""What the decoder multilingual_steering promises beyond its kind's contract."""

from __future__ import annotations

import pytest
import torch

from mixtura.authoring.contracts._decoded import model, sample_prompt, tokenizer
from mixtura.errors import UserError
from mixtura.methods.decoders import Calibration
from mixtura.methods.decoders.multilingual_steering import MultilingualSteering, share_of_tokens
from mixtura.rerouting.inside import steered_logits
from mixtura.running.decoders.calibrating import calibrate_on
from mixtura.types.steering import Steering


def test_frequencies_are_shares_of_tokens() -> None:
    assert share_of_tokens(torch.tensor([[0, 1], [1, 3], [1, 3]]), 3).tolist() == pytest.approx([1 / 3, 1, 0])


def test_soft_steering_adds_deviations_over_all_experts() -> None:
    logits = torch.tensor([[1.0, 3.0, 5.0, 7.0], [0.0, 0.0, 0.0, 4.0]])
    made = steered_logits(logits, Steering(spread=torch.tensor([0.5, 0.0, 0.0, 0.0])), 4)
    expected = logits.clone()
    expected[:, 0] += 0.5 * torch.tensor([5.0**0.5, 3.0**0.5])
    torch.testing.assert_close(made, expected)


def test_hard_steering_chooses_all_raised_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        logits = (30 * torch.randn(64, 8, generator=generator)).to(dtype)
        raised = torch.tensor([True, False, False, True, False, False, False, False])
        chosen = steered_logits(logits, Steering(highest=raised), 8).topk(2).indices.sort(-1).values
        assert chosen.tolist() == [[0, 3]] * 64


def test_task_experts_are_those_of_the_task_in_middle_layers() -> None:
    texts = [("", "abab", "task"), ("", "abba", "task"), ("", "xyxy", "general"), ("", "yxyx", "general")]
    made = calibrate_on(
        model(),
        MultilingualSteering(task="task", general="general", margin=0.25),
        texts,
        tokenizer=tokenizer(),
    )
    experts = made.values["experts"]
    assert experts
    assert set(experts) <= {"1", "2"}
    with pytest.raises(UserError, match="no text is labelled 'none'; the labels are general, task"):
        calibrate_on(model(), MultilingualSteering(task="none"), texts, tokenizer=tokenizer())


def test_hard_and_soft_steer_the_same_experts() -> None:
    found = Calibration(method="multilingual_steering", mark="", values={"experts": {"0": [2]}})
    prompt = sample_prompt(calibration=found)
    hard = MultilingualSteering(hard=True).open(prompt)[0].views[0].steering
    assert list(hard) == [0]
    assert hard[0].highest is not None
    assert hard[0].highest.nonzero().tolist() == [[2]]
