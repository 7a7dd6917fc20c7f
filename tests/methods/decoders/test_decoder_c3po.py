"""What the decoder c3po promises beyond its kind's contract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_model

from mixtura.authoring.contracts._decoded import model, samples, tokenizer
from mixtura.errors import UnsupportedModelError, UserError
from mixtura.methods.decoders.c3po import C3po, mixture
from mixtura.rerouting.inside import steered_logits
from mixtura.running.decoders.calibrating import calibrate_on
from mixtura.running.decoders.entry import decode
from mixtura.running.decoders.probing import save_calibration
from mixtura.types.steering import Steering


def test_mixed_probabilities_are_what_was_asked_for() -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    reference = torch.rand(8, generator=torch.Generator().manual_seed(1)).softmax(-1)
    made = steered_logits(logits, Steering(mixture=reference, share=torch.tensor(0.3)), 8).softmax(-1)
    torch.testing.assert_close(made, 0.7 * logits.softmax(-1) + 0.3 * reference)


def test_neighbours_are_weighted_by_likeness() -> None:
    keys = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    made = mixture(torch.tensor([2.0, 0.0]), keys, rows, 2)
    weights = torch.tensor([1.0, 0.5**0.5])
    torch.testing.assert_close(made, weights / weights.sum())


def test_a_store_of_the_prompt_itself_is_plain(tmp_path: Path) -> None:
    question, answer, label = samples()[0]
    made = calibrate_on(model(), C3po(), [(question, answer, label)], tokenizer=tokenizer())
    path = tmp_path / "own.safetensors"
    save_calibration(made, path)
    # The last token alone is mixed where one token is asked for.
    steered = decode(model(), tokenizer(), question, C3po(alpha=1.0), calibration=path, max_new_tokens=1)
    assert steered.token_ids == decode(model(), tokenizer(), question, max_new_tokens=1).token_ids


def test_without_references_or_a_softmax_it_is_refused() -> None:
    with pytest.raises(UserError, match="the whole answer by itself to none of 1 questions"):
        calibrate_on(model(), C3po(), [("abc", "zzzzzzzz", "x")], tokenizer=tokenizer())
    with pytest.raises(UnsupportedModelError, match="scores by sigmoid"):
        calibrate_on(tiny_model("deepseek_v3"), C3po(), [("ab", "cd", "x")], tokenizer=tokenizer())  # type: ignore[arg-type]
