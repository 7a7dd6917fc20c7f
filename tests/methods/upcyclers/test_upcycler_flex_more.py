"""What the upcycler flex_more promises beyond its kind's contract: the nearest matrices of a rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_checkpoints import save_dense

from mixtura.authoring.contracts import sample_dense_trace
from mixtura.checkpoints.dense.view import DenseView
from mixtura.checkpoints.upcycling.experts import Workshop
from mixtura.errors import SettingError
from mixtura.methods.upcyclers.flex_more import FlexMore
from mixtura.types.upcycling import Approach, Build, UpcycleShape


def test_changes_are_the_nearest_of_their_rank(tmp_path: Path) -> None:
    views = [
        DenseView(save_dense(tmp_path / str(seed), seed=seed, apart=0.1 * seed, tokenizer=False))
        for seed in (0, 1)
    ]
    workshop = Workshop(views, {}, torch.float32)
    base, wanted = workshop.make(Build(0, 0, 0)), workshop.make(Build(0, 0, 1))
    errors = []
    for rank in (0, 2, 8, 32, 48):
        made = workshop.make(Approach(0, 1, 1, 0, rank))
        for matrix, old, new in zip(made, base, wanted, strict=True):
            values = torch.linalg.svdvals((new - old).double())
            left = float((new - matrix).norm())
            assert left == pytest.approx(float(values[rank:].norm()), rel=1e-3, abs=1e-4)
        errors.append(float((wanted.up - made.up).norm()))
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(workshop.make(Approach(0, 1, 1, 0, 32)).up, wanted.up)


def test_ranks_differ_by_model(tmp_path: Path) -> None:
    dense = DenseView(save_dense(tmp_path / "dense", tokenizer=False)).shape
    trace = sample_dense_trace(dense, num_groups=3)
    shape = UpcycleShape(num_experts=3, top_k=1)
    recipe = FlexMore(ranks=[1, 7]).recipe((dense,) * 3, shape, trace)
    assert [a.rank for a in recipe.actions if isinstance(a, Approach) and a.layer == 0] == [1, 7]
    with pytest.raises(SettingError, match="one for each of 2 models after the first, got 1"):
        FlexMore(ranks=[1]).recipe((dense,) * 3, shape, trace)
