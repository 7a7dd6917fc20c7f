"""What the decoder compute_optimal promises beyond its kind's contract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deciding import several
from torch import Tensor

from mixtura.authoring.contracts._decoded import model, samples, tokenizer, verifier
from mixtura.errors import SettingError, UserError
from mixtura.methods.decoders import Branch
from mixtura.methods.decoders._difficulty import fitted
from mixtura.methods.decoders.compute_optimal import ComputeOptimal
from mixtura.running.decoders.calibrating import calibrate_on
from mixtura.running.decoders.entry import decode
from mixtura.running.decoders.probing import save_calibration

WAYS = ["parallel", "search", "search"]


def calibrated(folder: Path, decoder: ComputeOptimal) -> Path:
    made = calibrate_on(model(), decoder, samples(), tokenizer=tokenizer())
    path = folder / "made.safetensors"
    save_calibration(made, path)
    return path


def test_bins_go_from_easy_to_hard() -> None:
    made = ComputeOptimal(policy=["parallel", "search"])
    edges = torch.tensor([2.0])
    assert [made.way(hard, edges) for hard in (1.9, 2.0, 3.0)] == ["parallel", "search", "search"]


def test_a_search_keeps_the_best_of_the_beam_and_samples_never_wait() -> None:
    made = ComputeOptimal(budget=8, width=4)
    candidates = several([f"{letter}\n" for letter in "abcdefgh"], branch=Branch(state="search"))
    for place, one in enumerate(candidates):
        one.verdicts = [float(place % 5)]
    assert all(made.ends_step(one) for one in candidates)
    # Scores 0 1 2 3 4 0 1 2: the best two are the fifth and the fourth.
    assert made.choose(candidates) == [4] * 4 + [3] * 4
    candidates[4].finished = True
    assert made.choose(candidates) == [4] + [3] * 7
    assert not made.ends_step(several(["a\n"], branch=Branch(state="parallel"))[0])
    assert not ComputeOptimal(steps=0).ends_step(candidates[0])


def test_answers_are_weighed_by_the_sum_of_scores() -> None:
    candidates = several(["a: 1", "a: 2", "b: 2"])
    for one, verdict in zip(candidates, (0.5, 0.3, 0.3), strict=True):
        one.verdicts = [9.0, verdict]
    assert ComputeOptimal().select(candidates) == 1
    # Scores below 0, such as log-probabilities, must not count against an answer given often.
    for one, verdict in zip(candidates, (-0.1, -0.2, -0.2), strict=True):
        one.verdicts = [verdict - 1.0]
    candidates[0].verdicts = [-3.0]
    assert ComputeOptimal().select(candidates) == 1


def test_predictions_of_rows_left_out_are_those_of_fits_without_them() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(7, 4, generator=generator).double()
    wanted = torch.randn(7, generator=generator).double()
    weights, offset, seen = fitted(keys, wanted, 0.3)

    def solved(rows: Tensor, truth: Tensor) -> Tensor:
        """Of rows with a column of ones, whose weight is not kept small."""
        design = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
        penalty = 0.3 * torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]).double())
        return torch.linalg.solve(design.T @ design + penalty, design.T @ truth)

    torch.testing.assert_close(torch.cat([weights, offset[None]]), solved(keys, wanted))
    for row in range(7):
        others = [place for place in range(7) if place != row]
        alone = solved(keys[others], wanted[others])
        torch.testing.assert_close(seen[row], keys[row] @ alone[:-1] + alone[-1])


def test_difficulty_is_what_the_right_answer_costs(tmp_path: Path) -> None:
    found = calibrate_on(model(), ComputeOptimal(policy=WAYS), samples(), tokenizer=tokenizer())
    question, answer, _ = samples()[0]
    ids = torch.tensor([tokenizer().encode(question) + tokenizer().encode(answer, add_special_tokens=False)])
    asked = len(tokenizer().encode(question))
    one = model()(ids, labels=torch.cat([torch.full((1, asked), -100), ids[:, asked:]], 1)).loss
    alone = calibrate_on(
        model(), ComputeOptimal(policy=["search"]), [samples()[0]] * 2, tokenizer=tokenizer()
    )
    assert alone.values["mean_difficulty"] == pytest.approx(one.item(), rel=1e-4)
    assert found.values["questions"] == len(samples())
    assert len(found.tensors["edges"]) == 2


def test_the_way_is_that_of_the_question(tmp_path: Path) -> None:
    made = ComputeOptimal(budget=3, policy=WAYS)
    path = calibrated(tmp_path, made)
    options = {"calibration": path, "verifier": verifier, "max_new_tokens": 4, "seed": 1}
    answers = decode(model(), tokenizer(), [one[0] for one in samples()], made, **options)
    assert all(len(one.branches) == 3 for one in answers)
    with pytest.raises(UserError, match="has 3 bins of difficulty and policy names 2"):
        decode(model(), tokenizer(), "abc", ComputeOptimal(policy=["parallel", "search"]), **options)


def test_refusals() -> None:
    with pytest.raises(SettingError, match="must name a way for each bin"):
        ComputeOptimal(policy=[])
    with pytest.raises(UserError, match="5 bins of difficulty need 5 at least"):
        calibrate_on(model(), ComputeOptimal(), samples()[:2], tokenizer=tokenizer())
