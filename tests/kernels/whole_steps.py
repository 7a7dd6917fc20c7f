"""Models that decode in whole steps, beside the same ones as transformers has them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from families import tiny_model
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mixtura.kernels import isas, quicken, register_backend, using
from mixtura.kernels.step_stack import runs_together
from mixtura.machine.releases import returned_cache, with_cache

register_backend()


def generated(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 60, shape, generator=generated(seed))


def started(model: Any, ids: Tensor) -> DynamicCache:
    cache: DynamicCache = returned_cache(model(ids, use_cache=True))
    return cache


def step(model: Any, ids: Tensor, cache: DynamicCache, **named: Any) -> Tensor:
    """Logits of one token of each sequence."""
    logits: Tensor = model(ids, **with_cache(cache), use_cache=True, **named).logits
    return logits


def ready_pair() -> tuple[Any, Any]:
    """A model as transformers has it, and a quickened copy that has decoded."""
    plain: Any = tiny_model("qwen3_moe", dtype=torch.float32)
    plain.set_experts_implementation("mixtura")
    quick = copy.deepcopy(plain)
    quicken(quick)
    ids = ids_of(2, 6)
    with torch.no_grad():
        cache = started(quick, ids)
        for _ in range(3):
            step(quick, ids[:, :1], cache)
    assert not isas() or runs_together(quick.model)
    return plain, quick


def assert_same_steps(plain: Any, quick: Any, change: Callable[[Any], object]) -> None:
    """Both models give the same before a change in the midst of decoding and behind it."""
    ids = ids_of(2, 12)
    found = []
    for model, mode in ((plain, "torch"), (quick, "fast")):
        with torch.no_grad(), using(mode):
            cache = started(model, ids[:, :6])
            logits = [step(model, ids[:, t : t + 1], cache) for t in (6, 7, 8)]
            change(model)
            logits += [step(model, ids[:, t : t + 1], cache) for t in (9, 10, 11)]
            found.append(torch.cat(logits, dim=1))
    assert torch.allclose(*found, atol=1e-5)
