"""A model in less memory than its weights computes what it computes in memory, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_plans import save_packed, save_source, save_uneven, write
from tiny_scaled import save_fp8, save_mxfp4
from torch import Tensor
from transformers import PreTrainedModel

from mixtura import observe
from mixtura.checkpoints.apply import apply_plan
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.matrices import packable_matrices
from mixtura.checkpoints.skeleton import build, open_checkpoint
from mixtura.checkpoints.view import open_model
from mixtura.data.tokens import TokenBatch
from mixtura.kernels import isas, using
from mixtura.kernels.paths import paths_of
from mixtura.machine.releases import returned_cache, with_cache
from mixtura.methods import header, own_names
from mixtura.running.generation import new_tokens
from mixtura.running.loading import load
from mixtura.running.tiers import store
from mixtura.running.tiers.choosing import AUTO
from mixtura.running.tiers.opening import NO_PREFETCH, Wish, tiers_of
from mixtura.types import Merge, Plan, Quantize, QuantizeMatrix

PLAIN = (
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "mixtral",
    "olmoe",
    "gemma4",
    "jamba",
    "glm4_moe",
    "granitemoe",
)
GENERATOR_SEED = 0


@torch.no_grad()
def passes(model: PreTrainedModel) -> list[Tensor]:
    """Logits of a long text, of two texts side by side, and of steps that go on from them."""
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    made = []
    for rows, length in ((1, 40), (3, 7), (1, 3)):
        ids = torch.randint(3, 60, (rows, length + 4), generator=generator)
        outputs: Any = model(input_ids=ids[:, :length], use_cache=True)
        made.append(outputs.logits)
        cache = returned_cache(outputs)
        for place in range(length, length + 4) if cache is not None else ():
            outputs = model(input_ids=ids[:, place : place + 1], use_cache=True, **with_cache(cache))
            made.append(outputs.logits)
    return made


def require_equal(path: Path, wishes: list[Wish], **given: Any) -> None:
    expected = passes(load(path, **given))
    for wish in wishes:
        model = load(path, memory=wish, **given)
        for number, (found, wanted) in enumerate(zip(passes(model), expected, strict=True)):
            assert torch.equal(found, wanted), f"{wish}, pass {number}: {(found - wanted).abs().max()}"
        tiers = tiers_of(model)
        assert tiers is not None
        assert tiers.statistics.needed > 0


def slots(*counts: int, **given: Any) -> list[Wish]:
    return [Wish(pool_slots=count, **given) for count in counts]


@pytest.mark.parametrize("family", PLAIN)
def test_families(family: str, tmp_path: Path) -> None:
    require_equal(save_source(tmp_path / "source", family), slots(1, 2, 5, 1000))


@pytest.mark.parametrize("mode", ["exact", "torch"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_modes_of_the_kernels(family: str, mode: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", family)
    with using(mode):
        require_equal(source, slots(1, 3, 1000))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_in_fewer_bits(family: str, tmp_path: Path) -> None:
    _, packed = save_packed(tmp_path, family)
    require_equal(packed, slots(1, 3, 1000))
    with using("torch"):
        require_equal(packed, slots(2))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_that_must_come_in_order(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MOST_WAITING_BYTES", 0)
    require_equal(save_source(tmp_path / "source", family), slots(1, 3, 1000))


@pytest.mark.parametrize(("quantizer", "settings"), [("trellis", {"bits": 3}), ("nested", {})])
def test_codes_of_other_kinds(quantizer: str, settings: dict[str, Any], tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    actions = [
        Quantize(layer.index, expert, quantizer, settings)
        for layer in open_model(source).layers
        for expert in range(layer.num_experts)
    ]
    packed = write(source, tmp_path / "packed", *actions)
    require_equal(packed, slots(1, 3, 1000))
    if quantizer == "nested":
        require_equal(packed, slots(3), bits=2)


@pytest.mark.parametrize("save", [save_fp8, save_mxfp4])
def test_scaled_formats(save: Callable[[Path], Path], tmp_path: Path) -> None:
    require_equal(save(tmp_path / "source"), slots(2, 1000))


def test_merged_experts_and_the_rest_in_fewer_bits(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    view = open_checkpoint(source)
    eight = ("round_to_nearest", {"bits": 8})
    merges = [Merge(layer.index, (0, 3, 5), (0.5, 0.25, 0.25)) for layer in view.layers]
    rounding = [Quantize(layer.index, e, *eight) for layer in view.layers for e in (0, 1)]
    rest = [QuantizeMatrix(name, *eight) for name in packable_matrices(build(view), view)]
    plan = Plan(checkpoint_digest(source), (*merges, *rounding, *rest))
    merged = apply_plan(plan, source, tmp_path / "out", progress=False)
    require_equal(merged, slots(1, 3, 1000))
    tiers = tiers_of(load(merged, memory=Wish(pool_slots=1000)))
    assert tiers is not None
    # Merged experts take one slot under all of their numbers.
    apart = sum(len(layer.owners) for layer in tiers.recipes)
    assert apart == sum(layer.num_experts - 2 for layer in tiers.recipes)
    assert sum(pool.capacity for pool in tiers.pools) == apart
    assert tiers.key(0, 3) == tiers.key(0, 5) == tiers.key(0, 0)


def test_layers_with_other_numbers_of_experts(tmp_path: Path) -> None:
    require_equal(save_uneven(tmp_path, "qwen3_moe")[1], slots(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    require_equal(save_source(tmp_path / "source", "qwen3_moe"), slots(1, 3), dtype=dtype)


def test_caches_and_prefetchers(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "olmoe")
    text = TokenBatch(
        torch.arange(3, 51)[None],
        torch.ones(1, 48, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        ("a",),
    )
    observe(load(source), text, progress=False).save(tmp_path / "trace")
    caches = [name for name in own_names("caches") if "oracle" not in header("caches", name).tags]
    prefetchers = own_names("prefetchers")
    wishes = [
        Wish(pool_slots=count, cache=cache, prefetch=prefetch, trace=tmp_path / "trace")
        for place, cache in enumerate([AUTO, *caches])
        for count, prefetch in ((3, NO_PREFETCH), (9, prefetchers[place % len(prefetchers)]))
    ]
    require_equal(source, wishes)


def test_generating(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    prompt = torch.arange(3, 30)
    made = [
        new_tokens(model, prompt, max_new_tokens=12, min_new_tokens=12, temperature=temperature, seed=5)
        for temperature in (0.0, 1.0)
        for model in (load(source), load(source, memory=Wish(pool_slots=3)))
    ]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[2], made[3])
    assert not torch.equal(made[0], made[2])


@pytest.mark.skipif(not isas(), reason="the compiled step needs the compiled kernels")
def test_the_whole_step_stays_on(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "qwen3_moe")
    found = paths_of(load(source, memory=Wish(pool_slots=3)))
    assert [path.path for path in found] == [path.path for path in paths_of(load(source))]
    assert {path.path for path in found} == {"whole step"}
