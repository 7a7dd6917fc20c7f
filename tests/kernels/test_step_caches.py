"""Caches of every kind behind quickened layers: the same logits as without, whatever a cache gives back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import tiny_model
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from mixtura.kernels import isas, quicken, register_backend, using
from mixtura.kernels.paths import paths_of
from mixtura.kernels.step_layer import why_not_now
from mixtura.machine.releases import with_cache
from mixtura.running.generation import new_tokens, reserved_cache

register_backend()


class Rounded(DynamicLayer):
    """Gives keys and values back in fewer numbers than it got, as a quantised cache does."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep them rounded."""
        return super().update(*(torch.round(t * 8) / 8 for t in (key_states, value_states)), *args, **kwargs)


class Copied(DynamicLayer):
    """Gives back keys and values that lie the other way round in memory."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Keep them as they are."""
        return tuple(t.transpose(2, 3).contiguous().transpose(2, 3) for t in super().update(*args, **kwargs))


def of_layers(kind: type[DynamicLayer]) -> Callable[[Any], Cache]:
    return lambda model: Cache(layers=[kind() for _ in range(model.config.num_hidden_layers)])


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "dynamic without a configuration": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=40),
    "just as long": lambda model: StaticCache(config=model.config, max_cache_len=20),
    "reserved": lambda model: reserved_cache(model, 20),
    "rounded": of_layers(Rounded),
    "copied": of_layers(Copied),
}  # fmt: skip
# Families whose layers all see everything, of which some see a window, and of which all do.
FAMILIES = {"qwen3_moe": None, "mellum": None, "mixtral": 6}


def pair(family: str, window: int | None) -> tuple[Any, Any]:
    plain: Any = tiny_model(family)
    if window is not None:
        plain.config.sliding_window = window
    plain.set_experts_implementation("mixtura")
    quick = copy.deepcopy(plain)
    quicken(quick)
    return plain, quick


def logits(model: Any, cache: Any, ids: Tensor, parts: tuple[int, ...], mask: Tensor | None) -> Tensor:
    """Of a text read in parts of these lengths."""
    found, place = [], 0
    for num in parts:
        end = place + num
        named = {} if mask is None else {"attention_mask": mask[:, :end]}
        found.append(model(ids[:, place:end], **named, **with_cache(cache), use_cache=True).logits)
        place = end
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_of_any_kind_gives_the_same(
    kind: str, family: str, is_padded: bool, implementation: str
) -> None:
    plain, quick = pair(family, FAMILIES[family])
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids) if is_padded else None
    if mask is not None:
        mask[0, :3] = 0
    found = []
    for model, mode in ((plain, "torch"), (quick, "fast")):
        model.set_attn_implementation(implementation)
        with torch.no_grad(), using(mode):
            # A first text, so that the parts of the layers are found before the one that counts.
            logits(model, CACHES[kind](model), ids, (7, 1, 1), mask)
            found.append(logits(model, CACHES[kind](model), ids, (7, 1, 1, 4, 1, 6), mask))
    if mask is not None:
        found = [one[mask.bool()] for one in found]
    assert float((found[0] - found[1]).abs().max()) < 1e-5


@pytest.mark.skipif(not isas(), reason="the compiled kernels are missing")
@pytest.mark.parametrize("kind", ["static", "rounded", "copied"])
def test_layers_still_run_by_compiled_calls(kind: str) -> None:
    """Only the whole step needs a cache that it can append to."""
    _, quick = pair("qwen3_moe", None)
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits(quick, CACHES[kind](quick), ids, (7, 1, 1), None)
    assert [why_not_now(layer) for layer in quick.model.layers] == [""] * 3
    found = paths_of(quick, probe=False)
    assert {path.path for path in found} == {"both halves"}
    assert all(path.reason.startswith("its cache") for path in found)


@pytest.mark.skipif(not isas(), reason="the compiled kernels are missing")
@pytest.mark.parametrize("family", FAMILIES)
def test_generating_takes_whole_steps(family: str) -> None:
    plain, quick = pair(family, FAMILIES[family])
    ids = torch.randint(3, 60, (7,), generator=torch.Generator().manual_seed(1))
    with using("torch"):
        expected = new_tokens(plain, ids, max_new_tokens=9, min_new_tokens=9)
    assert torch.equal(new_tokens(quick, ids, max_new_tokens=9, min_new_tokens=9), expected)
    assert {path.path for path in paths_of(quick, probe=False)} == {"whole step"}


def test_a_mask_of_other_keys_is_refused_as_by_the_model_itself() -> None:
    plain, quick = pair("qwen3_moe", None)
    ids = torch.randint(3, 60, (1, 8), generator=torch.Generator().manual_seed(1))
    for length in (4, 7):
        for model in (plain, quick):
            with torch.no_grad():
                cache = DynamicCache(config=model.config)
                model(ids[:, :5], **with_cache(cache), use_cache=True)
                mask = torch.zeros(1, 1, 1, length)
                with pytest.raises(RuntimeError):
                    model(ids[:, 5:6], attention_mask=mask, **with_cache(cache), use_cache=True)
