"""What the upcycler copies promises beyond its kind's contract: neurons drawn anew."""

from __future__ import annotations

from pathlib import Path

import torch
from dense_checkpoints import save_dense

from mixtura.checkpoints.dense.view import DenseView
from mixtura.checkpoints.upcycling.experts import Workshop
from mixtura.methods.upcyclers.copies import Copies
from mixtura.types.upcycling import Build, DenseShape, UpcycleShape


def test_a_share_of_neurons_is_drawn_anew_as_their_matrices_are_distributed(tmp_path: Path) -> None:
    view = DenseView(save_dense(tmp_path / "dense", tokenizer=False, intermediate_size=400))
    shape = UpcycleShape(num_experts=3, top_k=1, seed=5)
    recipe = Copies(redrawn=0.25).recipe((view.shape,), shape, None)
    builds = [a for a in recipe.actions if isinstance(a, Build) and a.layer == 1]
    workshop = Workshop([view], {}, torch.float32)
    dense = workshop.make(Build(1, 0, 0))
    changed = []
    for action in builds:
        made = workshop.make(action)
        rows = (made.gate != dense.gate).all(1)
        assert int(rows.sum()) == 100
        # The same neurons in all three matrices, whole; the others are the source's to the bit.
        assert torch.equal(rows, (made.up != dense.up).all(1))
        assert torch.equal(rows, (made.down != dense.down).all(0))
        assert torch.equal(made.gate[~rows], dense.gate[~rows])
        assert torch.equal(made.down[:, ~rows], dense.down[:, ~rows])
        for new, old in ((made.up[rows], dense.up[rows]), (made.down[:, rows], dense.down[:, rows])):
            assert abs(float(new.std() / old.std()) - 1) < 0.05
            assert abs(float(new.mean() - old.mean())) < 0.1 * float(old.std())
        changed.append(rows)
    assert not torch.equal(changed[0], changed[1])
    assert torch.equal(workshop.make(builds[0]).up, workshop.make(builds[0]).up)


def test_another_seed_draws_others() -> None:
    dense = DenseShape(d_model=4, d_ffn=8, num_layers=1)
    one, other = (
        Copies(redrawn=0.5).recipe((dense,), UpcycleShape(num_experts=2, top_k=1, seed=seed), None)
        for seed in (0, 1)
    )
    assert one != other
