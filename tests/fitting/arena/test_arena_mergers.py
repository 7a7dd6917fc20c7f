"""The arena of mergers: who takes part, what is measured of a merge, and a contest end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import run_mixtura, save_tiny
from tiny_plans import write
from torch import Tensor

from mixtura.fitting.arena.entries import MERGERS, RANDOM, REFERENCE, entries
from mixtura.fitting.arena.exam import Exam, Sizes
from mixtura.fitting.arena.standings import KEEPS
from mixtura.methods import names
from mixtura.running.loading import load
from mixtura.types import Merge, Plan

SMALL = Sizes(length=48, held_out_tokens=400, tasks=1, prompts=3, prompt_tokens=8, new_tokens=6)
GROUPS = (Merge(0, (1, 4, 6), (0.5, 0.25, 0.25)), Merge(1, (0, 2), (0.75, 0.25), aligned=True))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("arena") / "tiny")


def test_every_merger_takes_part_beside_pruners_of_the_same_size() -> None:
    taking_part = {entry.name: entry for entry in entries(kind=MERGERS)}
    assert set(names(MERGERS)) <= set(taking_part)
    assert {name for name, entry in taking_part.items() if entry.baseline} == {REFERENCE, RANDOM, "average"}
    assert taking_part["reap"].kind == "pruners"
    assert taking_part["m_smoe"].features == ("logit_products",)
    assert taking_part["reap"].statistics
    assert {entry.name for entry in entries(["hc_smoe"], MERGERS)} == {
        "hc_smoe", REFERENCE, RANDOM, "average",
    }  # fmt: skip


@torch.no_grad()
def test_the_loss_is_that_of_the_checkpoint_that_the_plan_makes(tiny: Path, tmp_path: Path) -> None:
    exam = Exam(tiny, SMALL, seed=1)
    found = exam.loss(Plan("", GROUPS))
    merged = load(write(tiny, tmp_path / "out", *GROUPS), dtype=torch.float32)
    total, count = 0.0, 0
    for part in exam._held_out:
        for ids, mask in zip(part.input_ids, part.attention_mask, strict=True):
            tokens = ids[mask.bool()][None]
            pair: list[Tensor] = [
                model(input_ids=tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
                for model in (exam.model, merged)
            ]
            total += float((pair[0].exp() * (pair[0] - pair[1])).sum())
            count += len(pair[0])
    assert found["kl"] == pytest.approx(total / count, rel=1e-3)
    assert exam.loss(Plan(""))["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_the_command(tiny: Path, tmp_path: Path) -> None:
    places = ("--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--model", str(tiny))
    done = run_mixtura("arena", "mergers", "--only", "m_smoe", "--seeds", "1", "--tokens", "300", *places)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out/mergers.md").read_text()
    assert page.startswith("# The arena: mergers")
    assert "`m_smoe`" in page
    numbers = json.loads((tmp_path / "out/mergers.json").read_text())
    assert numbers["about"]["kind"] == "mergers"
    # m_smoe, average and the pruners frequency and random, each at three shares; no single domains.
    assert len(numbers["cases"]) == 4 * len(KEEPS)
