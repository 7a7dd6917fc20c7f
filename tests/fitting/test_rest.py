"""What 8 bits save outside the experts, as predicted and as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import save_tiny

from mixtura.checkpoints.apply import apply_plan
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.fitting.rest import Rest, rest_of
from mixtura.running.memory import account
from mixtura.types import Plan, Quantize

CONTEXT = 32


# A plain one, tied embeddings, a hybrid, shared experts with latent attention.
@pytest.mark.parametrize("family", ["qwen3_moe", "gemma4", "jamba", "deepseek_v3"])
def test_the_account_falls_by_what_is_predicted(family: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", family)
    view = open_checkpoint(source)
    kept = account(view, CONTEXT, as_packed=True)
    rest = rest_of(view, CONTEXT, kept)
    assert rest.names
    experts = [
        Quantize(layer.index, e, "round_to_nearest", {"bits": 8})
        for layer in view.layers
        for e in range(layer.num_experts)
    ]
    digest = checkpoint_digest(source)
    plain = apply_plan(Plan(digest, tuple(experts)), source, tmp_path / "plain", progress=False)
    both = Plan(digest, (*experts, *rest.actions))
    packed = apply_plan(both, source, tmp_path / "packed", progress=False)
    fell = account(plain, CONTEXT).total_bytes - account(packed, CONTEXT).total_bytes
    assert fell == pytest.approx(rest.saved_bytes, abs=8 << 10)
    assert 0 < rest.saved_active_bytes <= rest.saved_bytes * 1.5


def test_only_what_is_named_changes() -> None:
    rest = Rest(("a",), 1, 1.0)
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    changed = rest.changed("a", weight)
    assert not torch.equal(changed, weight)
    # A row's step is its largest weight over 127.5, and no weight is off by more than half of it.
    assert bool(((changed - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127.5 * 0.51 + 1e-3).all())
    assert rest.changed("b", weight) is weight
