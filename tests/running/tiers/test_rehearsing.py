"""Finding out how layers can run reads a few experts, not all that random tokens choose."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_plans import save_packed

from mixtura.kernels.paths import paths_of
from mixtura.machine.releases import returned_cache, with_cache
from mixtura.running.loading import load
from mixtura.running.resolve import resolve_model
from mixtura.running.tiers.opening import Wish, tiers_of


@torch.no_grad()
def test_the_first_tokens_read_little_more_than_their_own() -> None:
    path = resolve_model(None).path
    whole, model = load(path), load(path, memory=Wish(pool_slots=1000))
    tiers = tiers_of(model)
    assert tiers is not None
    caches: dict[object, object] = {}
    for token in (7, 8, 9):
        made = []
        for one in (whole, model):
            named = with_cache(caches[one]) if one in caches else {}
            outputs = one(input_ids=torch.tensor([[token]]), use_cache=True, **named)
            caches[one] = returned_cache(outputs)
            made.append(outputs.logits)
        assert torch.equal(*made)
    top_k, layers = model.config.num_experts_per_tok, len(tiers.recipes)
    read = tiers.statistics.demanded_bytes // tiers.recipes[0].num_bytes(0)
    # Three tokens' own, two that stand in for all others, and a token that the layers are tried on together.
    assert read <= layers * (4 * top_k + 2)
    # Which is well below what there is.
    assert read < sum(recipe.num_experts for recipe in tiers.recipes)
    assert [one.path for one in paths_of(model)] == [one.path for one in paths_of(whole)]


def test_only_experts_that_lie_alike_stand_in_for_each_other(tmp_path: Path) -> None:
    _, packed = save_packed(tmp_path, "qwen3_moe")
    tiers = tiers_of(load(packed, memory=Wish(pool_slots=3)))
    assert tiers is not None
    before = [[tiers.key(n, e) for e in range(r.num_experts)] for n, r in enumerate(tiers.recipes)]
    for layer, recipe in enumerate(tiers.recipes):
        with tiers.rehearsing(layer):
            for expert in range(recipe.num_experts):
                other = tiers.key(layer, expert).expert
                assert recipe.form(other) == recipe.form(expert)
                assert tiers.pool(layer, other) is tiers.pool(layer, expert)
            few = {tiers.key(layer, expert) for expert in range(recipe.num_experts)}
            assert len(few) <= 2 * len({str(recipe.form(expert)) for expert in range(recipe.num_experts)})
    assert before == [[tiers.key(n, e) for e in range(r.num_experts)] for n, r in enumerate(tiers.recipes)]
