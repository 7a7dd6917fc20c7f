"""Texts of different lengths take a whole step together, each from a cache of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from whole_steps import ids_of, ready_pair

from mixtura.kernels import isas, register_backend
from mixtura.kernels.backend import experts_layer
from mixtura.kernels.loads import count_loads
from mixtura.kernels.several import SideBySide
from mixtura.kernels.step_stack import why_not_together
from mixtura.machine.releases import with_cache

register_backend()
LENGTHS = (5, 1, 9)


@pytest.fixture(scope="module")
def ready() -> tuple[Any, Any]:
    return ready_pair()


def texts(model: Any) -> list[DynamicCache]:
    """Caches of texts of those lengths."""
    made = []
    for place, length in enumerate(LENGTHS):
        cache = DynamicCache(config=model.config)
        model(ids_of(1, length).roll(place), use_cache=True, **with_cache(cache))
        made.append(cache)
    return made


@torch.no_grad()
def together(model: Any, caches: list[DynamicCache], ids: torch.Tensor) -> torch.Tensor:
    side = SideBySide(caches)
    out = model(
        ids, attention_mask=side.mask(), position_ids=side.places(), use_cache=True, **with_cache(side)
    )
    logits: torch.Tensor = out.logits[:, -1]
    return logits


@pytest.mark.parametrize("which", [0, 1], ids=["transformers' own", "quickened"])
@torch.no_grad()
def test_each_gets_what_it_gets_alone(ready: tuple[Any, Any], which: int) -> None:
    model = ready[which]
    caches = texts(model)
    alone = copy.deepcopy(caches)
    for step in range(3):
        ids = torch.tensor([[step + 3], [step + 11], [step + 7]])
        found = together(model, caches, ids)
        for row, cache in enumerate(alone):
            expected = model(ids[row : row + 1], use_cache=True, **with_cache(cache)).logits[0, -1]
            torch.testing.assert_close(found[row], expected, atol=2e-5, rtol=1e-4)
    assert [cache.get_seq_length() for cache in caches] == [length + 3 for length in LENGTHS]
    if which == 1 and isas():
        assert why_not_together(model.model) == ""


@torch.no_grad()
def test_another_mask_or_place_is_no_whole_step(ready: tuple[Any, Any]) -> None:
    model = ready[1]
    side = SideBySide(texts(model))
    mask = side.mask()
    mask[2, 0] = 0
    model(
        torch.tensor([[3], [4], [5]]),
        attention_mask=mask,
        position_ids=side.places(),
        use_cache=True,
        **with_cache(side),
    )
    assert why_not_together(model.model)


@torch.no_grad()
def test_tokens_of_each_expert_are_counted_in_every_way_to_run(ready: tuple[Any, Any]) -> None:
    for model in map(copy.deepcopy, ready):
        top_k = model.config.num_experts_per_tok
        blocks = [layer.mlp.experts for layer in model.model.layers]
        loads = [count_loads(block, model.config.num_experts) for block in blocks]
        assert count_loads(blocks[0], 1) is loads[0]
        cache = DynamicCache(config=model.config)
        model(ids_of(1, 6), use_cache=True, **with_cache(cache))
        for _ in range(3):
            model(ids_of(1, 1), use_cache=True, **with_cache(cache))
        before = [int(one.sum()) for one in loads]
        model(ids_of(1, 1), use_cache=True, **with_cache(cache))
        assert [int(one.sum()) - was for one, was in zip(loads, before, strict=True)] == [top_k] * len(loads)
        assert experts_layer(blocks[0]) is not None or not isas()
