"""How the memory of a model that is served is divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from serving_helpers import SPECIMEN
from tiny_checkpoints import save_tiny

import mixtura
from mixtura.checkpoints.skeleton import build, empty_experts, open_checkpoint
from mixtura.errors import SettingError
from mixtura.machine.releases import with_cache
from mixtura.running.generation import reserved_cache
from mixtura.running.tiers.budget import divide
from mixtura.running.tiers.opening import Wish
from mixtura.running.tiers.recipes import recipe_of
from mixtura.serving.engine.caches import beginning_of, measured_cost
from mixtura.serving.opening import Serving, _divided, open_model

CONTEXT = 128


def test_what_several_texts_take_is_left_by_the_pool() -> None:
    view = open_checkpoint(SPECIMEN)
    serving = Serving(memory=Wish(memory="100MiB"), running=8)
    assert serving.memory is not None
    caches, wish = _divided(view, serving, serving.memory, CONTEXT)
    assert wish.context == CONTEXT
    skeleton = build(view)
    recipes = [recipe_of(view, layer, empty_experts(skeleton, layer)) for layer in view.layers]
    plain = divide(view, recipes, 80 << 20, CONTEXT, runtime=0)
    shared = divide(view, recipes, 80 << 20, CONTEXT, runtime=0, more=10 << 20)
    assert shared.fixed_bytes == plain.fixed_bytes + (10 << 20)
    assert shared.pool_bytes < plain.pool_bytes
    # Four full contexts, of which the account of one text has one already.
    assert caches == pytest.approx(4 * 3072 * CONTEXT, rel=0.05)
    assert wish.more_bytes > caches * 3 // 4


def test_a_context_that_the_model_was_not_made_for_is_refused() -> None:
    with pytest.raises(SettingError, match="512 positions"):
        open_model(SPECIMEN, Serving(context=1000))
    with pytest.raises(SettingError, match="at least 2"):
        open_model(SPECIMEN, Serving(context=1))


@torch.no_grad()
def test_a_cache_costs_what_is_set_apart_for_it(tmp_path: Any) -> None:
    model = mixtura.load(save_tiny(tmp_path))
    cost = measured_cost(model)
    cache: Any = reserved_cache(model, 40)
    model(torch.tensor([[5] * 20]), use_cache=True, **with_cache(cache))
    assert sum(layer.num_bytes for layer in cache.layers) == cost.of(40)
    copied: Any = beginning_of(model, cache, 12, 30)
    assert sum(layer.num_bytes for layer in copied.layers) == cost.of(30)
    assert torch.equal(copied.layers[0].keys, cache.layers[0].keys[..., :12, :])
    consumed: Any = beginning_of(model, cache, 12, 30, consume=True)
    assert torch.equal(consumed.layers[1].keys, copied.layers[1].keys)
    assert cache.layers == [None] * len(consumed.layers)


def test_windows_are_not_counted_for_more_than_they_hold(tmp_path: Any) -> None:
    cost = measured_cost(mixtura.load(save_tiny(tmp_path, "gpt_oss")))
    assert cost.windowed_bytes > 0
    beyond = cost.window + 100
    assert cost.of(beyond) - cost.of(beyond - 10) == 10 * cost.token_bytes
    for num_tokens in (cost.window // 2, beyond):
        assert cost.tokens_in(cost.of(num_tokens)) == num_tokens
