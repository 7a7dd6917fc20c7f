"""What the upcycler router_upcycling promises beyond its kind's contract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_checkpoints import dense_model, logits_of, save_dense

import mixtura
from mixtura.methods.upcyclers.router_upcycling import RouterUpcycling
from mixtura.running.loading import load_own_model
from mixtura.types.upcycling import Build, DenseShape, Fill, UpcycleShape

DENSE = DenseShape(d_model=8, d_ffn=8, num_layers=2, num_heads=4, num_key_value_heads=2, d_head=3)


def test_keys_are_those_of_the_head_that_serves_the_query() -> None:
    shape = UpcycleShape(num_experts=3, top_k=1, seed=4)
    recipe = RouterUpcycling(num_routers=3).recipe((DENSE,), shape, None)
    key = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    fill = next(a for a in recipe.actions if isinstance(a, Fill) and a.name == "key" and a.layer == 1)
    features = recipe.arrays[str(fill.times)]
    made = fill.made(key, recipe.arrays)
    assert made.shape == (3, 3, 3)
    for router, owner in enumerate((0, 0, 1)):
        for expert in range(3):
            wanted = key[3 * owner : 3 * owner + 3] @ features[expert]
            torch.testing.assert_close(made[router, expert], wanted)


def test_features_differ_by_layer_and_seed_and_repeat() -> None:
    def features(seed: int) -> list[torch.Tensor]:
        recipe = RouterUpcycling().recipe((DENSE,), UpcycleShape(num_experts=3, top_k=1, seed=seed), None)
        return [recipe.arrays[str(a.times)] for a in recipe.actions if isinstance(a, Fill) and a.times]

    first, second = features(0)
    assert not torch.equal(first, second)
    assert not torch.equal(first, features(1)[0])
    assert torch.equal(first, features(0)[0])


def test_a_share_of_neurons_is_drawn_anew() -> None:
    recipe = RouterUpcycling(redrawn=0.5).recipe((DENSE,), UpcycleShape(num_experts=2, top_k=1), None)
    assert {a.redrawn for a in recipe.actions if isinstance(a, Build)} == {0.5}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_of_it_is_the_dense_one_and_routes_by_attention(family: str, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", family)
    made = mixtura.upcycle(
        source, tmp_path / "out", method="router_upcycling", experts=4, top_k=2, measure=False
    )
    assert made.family == "mixtura"
    assert made.promised
    dense, own = dense_model(family), load_own_model(tmp_path / "out")
    torch.testing.assert_close(logits_of(own), logits_of(dense), atol=2e-5, rtol=1e-5)
    attention = dense.model.layers[1].self_attn
    heads = attention.q_proj.weight.detach().view(4, -1, 32)
    torch.testing.assert_close(own.model.blocks[1].router.query.detach(), heads)
    # Tokens are told apart.
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        routing = own.model(ids).routings[1]
    assert (routing.load > 0).sum() > 2
