"""How much a fit measures for its time, and text cut to that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import save_tiny

from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.fitting.depth import Depth, Work, choose_depth, positions, shortened
from mixtura.fitting.pace import Pace, measure_pace
from mixtura.fitting.palette import STORED
from mixtura.fitting.quality import HeldOut
from mixtura.fitting.records import Request
from mixtura.fitting.texts import Texts, texts_of

PACE = Pace(
    read_s=0.0,
    cold_s=0.0,
    round_s={option: option * 1e-6 for option in STORED},
    decode_s=dict.fromkeys(STORED, 0.0),
    row_s=1e-9,
    token_s=1e-4,
    step_s=1e-4,
    head_s=0.0,
)


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> CheckpointView:
    return open_checkpoint(save_tiny(tmp_path_factory.mktemp("depth") / "tiny"))


@pytest.fixture(scope="module")
def texts(view: CheckpointView) -> Texts:
    return texts_of(Request(model=view.path, out=Path("unused")), 64, load_tokenizer(view.path))


def experts_weights(view: CheckpointView) -> list[int]:
    return [
        sum(m.numel() for m in (layer.native_expert(0).up, layer.native_expert(0).down))
        for layer in view.layers
    ]


def test_observing_is_rounding_and_multiplying_at_the_measured_rates(view: CheckpointView) -> None:
    work, expected = Work(view, PACE), 0.0
    for layer, weights in zip(view.layers, experts_weights(view), strict=True):
        expected += layer.num_experts * weights * sum(STORED) * 1e-6
        expected += 1000 * layer.top_k * weights * 1e-9 * (1 + len(STORED))
    expected += 1000 * view.config.num_hidden_layers * 1e-4
    assert work.observing_s(1000, None) == pytest.approx(expected)
    assert work.observing_s(1000, 1) < work.observing_s(1000, None)


def test_a_candidate_is_read_and_rounded_for_each_part_of_the_text(
    view: CheckpointView, texts: Texts
) -> None:
    part = texts.held_out[0]
    work = Work(view, replace(PACE, read_s=1e-6, token_s=0.0, row_s=0.0))
    assert work.pass_s((part, part)) == pytest.approx(2 * work.pass_s((part,)))
    stored = sum(layer.num_experts * layer.expert_num_bytes for layer in view.layers)
    assert work.pass_s((part,)) == pytest.approx(stored * 1e-6)


def test_all_is_measured_where_there_is_time_and_less_with_less_time(
    view: CheckpointView, texts: Texts
) -> None:
    work = Work(view, PACE)
    assert choose_depth(work, texts, 1e6).is_full
    depths = [choose_depth(work, texts, seconds) for seconds in (30.0, 8.0, 2.0, 1e-3)]
    assert not any(depth.is_full for depth in depths)
    tokens = [depth.held_out_tokens for depth in depths]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] > tokens[-1]


def test_what_is_chosen_is_predicted_to_fit(view: CheckpointView, texts: Texts) -> None:
    work = Work(view, PACE)
    for seconds in (20.0, 10.0, 5.0):
        depth = choose_depth(work, texts, seconds)
        cut = shortened(texts, depth)
        observing = work.observing_s(positions(cut.calibration), depth.priced_experts)
        rounding = max(work.rounding_s(option, depth.priced_experts) for option in STORED)
        judging = work.pass_s(cut.held_out) + 2 * work.candidate_s(cut.held_out)
        assert observing + rounding + judging <= seconds


def made(rows: int, width: int, first: int, answer_from: int | None) -> HeldOut:
    ids = torch.arange(first, first + rows * width).reshape(rows, width)
    answers = torch.zeros(rows, width, dtype=torch.bool)
    if answer_from is not None:
        answers[:, answer_from:] = True
    return HeldOut(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        domains=torch.zeros(rows, dtype=torch.long).numpy(),
        domain_names=("code",) if answer_from is None else ("tasks",),
        groups=("" if answer_from is None else "sums",) * rows,
        answers=answers,
    )


def test_shorter_text_is_the_first_of_every_part_in_one_batch() -> None:
    plain, asked = made(8, 400, 0, None), made(8, 150, 10_000, 140)
    whole = Texts((plain, asked), (plain, asked), "sha256:x")
    (cut,) = shortened(whole, Depth(900, 900, 2)).held_out
    assert cut.input_ids.shape == (6, 150)
    assert torch.equal(cut.input_ids[:3], plain.input_ids[:3, :150])
    assert torch.equal(cut.input_ids[3:], asked.input_ids[:3])
    assert [cut.domain_names[d] for d in cut.domains] == ["code"] * 3 + ["tasks"] * 3
    assert cut.groups == ("", "", "", "sums", "sums", "sums")
    assert not cut.answers[:3].any()
    assert torch.equal(cut.answers[3:], asked.answers[:3])


def test_an_answer_that_is_cut_off_is_not_asked_for() -> None:
    long, short = made(4, 300, 0, 290), made(4, 100, 5_000, 90)
    (cut,) = shortened(Texts((long, short), (long, short), "x"), Depth(10_000, 10_000, 2)).held_out
    assert cut.input_ids.shape[1] == 128
    assert cut.attention_mask.sum(1).tolist() == [128] * 4 + [100] * 4
    assert not cut.answers[:4].any()
    assert (cut.answers[4:].sum(1) == 10).all()


def test_full_depth_leaves_the_text_alone(texts: Texts) -> None:
    assert shortened(texts, Depth()) is texts


def test_the_pace_is_measured_without_changing_the_model(view: CheckpointView) -> None:
    pace = measure_pace(view)
    rates = [
        pace.read_s,
        pace.cold_s,
        *pace.round_s.values(),
        *pace.decode_s.values(),
        pace.row_s,
        pace.token_s,
        pace.step_s,
        pace.head_s,
    ]
    assert all(rate > 0 for rate in rates)
    assert pace.cold_s >= pace.read_s
