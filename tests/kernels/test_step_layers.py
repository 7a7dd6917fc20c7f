"""Decoder layers of whole models by compiled calls: what the unmodified model gives, or its own path."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model
from family_sizes import SIZES
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from mixtura.kernels import isas, pack_linears, quicken, register_backend, using
from mixtura.kernels.step_layer import QuickLayer, state_of
from mixtura.kernels.step_stack import runs_together
from mixtura.machine.releases import returned_cache, with_cache

register_backend()

# Families with layers of the usual form, and which halves of their layers compiled calls run: attention, what
# follows it, both or none.
HALVES = {
    "aria": "AM", "deepseek_ocr2": "AM", "deepseek_v3": "-M", "dots1": "A", "exaone_moe": "A", "flint": "-M",
    "glm4_moe": "A", "gpt_oss": "-M", "hunyuan_v1_moe": "-M", "hy_v3": "A", "mellum": "AM",
    "mimo_v2_flash": "-M", "minimax_m2": "AM", "mixtral": "AM", "olmoe": "AM", "phimoe": "--",
    "qwen2_moe": "AM", "qwen3_moe": "AM",
    "qwen3_vl_moe": "AM", "solar_open": "A", "unlimited_ocr": "A", "deepseek_v32": "--", "ernie4_5_moe": "A",
    "mistral4": "--", "laguna": "-M", "minimax_m3_vl": "--",
}  # fmt: skip
QUICK = ("olmoe", "qwen3_moe", "mixtral", "qwen2_moe")
compiled = bool(isas())


def pair(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model as transformers has it and the same one quickened; both run experts by this library."""
    plain: Any = tiny_model(family, dtype=dtype)
    plain.set_experts_implementation("mixtura")
    quick = copy.deepcopy(plain)
    quicken(quick)
    return plain, quick


def ids_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def in_steps(model: Any, ids: Tensor, mask: Tensor, first: int, mode: str) -> Tensor:
    """Logits of the first tokens at once and of the others one by one."""
    found, cache = [], None
    with torch.no_grad(), using(mode):
        ends = [first, *range(first + 1, ids.shape[1] + 1)]
        for start, stop in zip([0, *ends], ends, strict=False):
            output = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], **with_cache(cache), use_cache=True
            )
            found.append(output.logits)
            cache = returned_cache(output)
    return torch.cat(found, dim=1)


def error(found: Tensor, expected: Tensor, mask: Tensor) -> float:
    there = mask.bool()
    return float((found - expected)[there].abs().max() / expected[there].abs().max())


def halves(model: nn.Module) -> set[str]:
    """Of each decoder layer of the usual form, once it has run."""
    return {state_of(layer) for layer in model.modules() if isinstance(layer, QuickLayer)}


def padded(num: int, length: int) -> Tensor:
    mask = torch.ones(num, length, dtype=torch.long)
    mask[0, :3] = 0
    return mask


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in HALVES if family in FAMILIES])
def test_a_quickened_family_gives_the_same(family: str) -> None:
    plain, quick = pair(family)
    ids, mask = ids_of(2, 13), padded(2, 13)
    expected = in_steps(plain, ids, mask, 9, "torch")
    assert error(in_steps(quick, ids, mask, 9, "fast"), expected, mask) < 1e-5
    if compiled:
        found = "".join(sorted(halves(quick)))
        assert HALVES[family] in found or HALVES[family] == "A"
        assert "A" in found or HALVES[family] in ("-M", "--")


@pytest.mark.parametrize("family", ["dots1", "glm4_moe", "deepseek_v3"])
def test_corrected_scores_choose_the_same_experts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("n_group", "topk_group"):
        monkeypatch.setitem(SIZES, name, 1)
    plain, quick = pair(family)
    ids, mask = ids_of(2, 13), padded(2, 13)
    found, expected = in_steps(quick, ids, mask, 9, "fast"), in_steps(plain, ids, mask, 9, "torch")
    assert error(found, expected, mask) < 1e-5
    assert not compiled or halves(quick) == {"-M" if family == "deepseek_v3" else "AM"}


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("family", QUICK)
def test_every_instruction_set_gives_the_same(family: str, isa: str) -> None:
    plain, quick = pair(family)
    ids, mask = ids_of(3, 20), padded(3, 20)
    with using(isa=isa):
        found = in_steps(quick, ids, mask, 16, "fast")
    assert error(found, in_steps(plain, ids, mask, 16, "torch"), mask) < 1e-5
    assert halves(quick) == {"AM"}


@pytest.mark.parametrize("family", QUICK)
def test_bfloat16_is_as_near_to_float32_as_without(family: str) -> None:
    ids, mask = ids_of(4, 16), padded(4, 16)
    plain, quick = pair(family, torch.bfloat16)
    truth = copy.deepcopy(plain).float()
    expected = in_steps(truth, ids, mask, 9, "torch")
    there = mask.bool()
    ours, theirs = (
        float((in_steps(model, ids, mask, 9, mode).float() - expected)[there].norm() / expected[there].norm())
        for model, mode in ((quick, "fast"), (plain, "torch"))
    )
    assert ours < 1.3 * theirs


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", QUICK)
def test_generation_chooses_the_same_tokens(family: str, implementation: str) -> None:
    plain, quick = pair(family)
    for model in (plain, quick):
        model.set_attn_implementation(implementation)
    ids, mask = ids_of(3, 7), padded(3, 7)
    for settings in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        made = [
            model.generate(
                ids, attention_mask=mask, max_new_tokens=14, do_sample=False, eos_token_id=None, **settings
            )
            for model in (plain, quick)
        ]
        assert torch.equal(*made)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral", "qwen2_moe", "minimax_m2"])
def test_a_whole_step_is_one_call(family: str) -> None:
    plain, quick = pair(family)
    ids = ids_of(2, 24)
    mask = torch.ones_like(ids)
    assert error(in_steps(quick, ids, mask, 6, "fast"), in_steps(plain, ids, mask, 6, "torch"), mask) < 1e-5
    if compiled:
        assert runs_together(quick.model)
        handle = quick.model.layers[1].mlp.register_forward_hook(lambda *_: None)
        assert (
            error(in_steps(quick, ids, mask, 6, "fast"), in_steps(plain, ids, mask, 6, "torch"), mask) < 1e-5
        )
        handle.remove()


def test_a_window_slides() -> None:
    plain, quick = pair("mixtral")
    for model in (plain, quick):
        model.config.sliding_window = 8
    ids = ids_of(2, 30)
    mask = torch.ones_like(ids)
    assert error(in_steps(quick, ids, mask, 5, "fast"), in_steps(plain, ids, mask, 5, "torch"), mask) < 1e-5


def logits(model: Any, ids: Tensor, **named: Any) -> Tensor:
    found: Tensor = model(ids, **named).logits
    return found


@pytest.fixture
def ready() -> tuple[Any, Any]:
    """Two models that have run, with the same parameters."""
    plain, quick = pair("qwen3_moe")
    with torch.no_grad():
        logits(quick, ids_of(1, 5))
    return plain, quick


def test_training_and_gradients_take_the_layers_own_path(ready: tuple[Any, Any]) -> None:
    plain, quick = ready
    ids = ids_of(2, 6)
    for model in (plain, quick):
        model(ids, labels=ids).loss.backward()
    for (name, mine), (_, theirs) in zip(quick.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-6), name


def test_what_is_asked_for_beside_logits_comes(ready: tuple[Any, Any]) -> None:
    plain, quick = ready
    ids = ids_of(2, 6)
    for flag, count in (("output_router_logits", 3), ("output_hidden_states", 4)):
        with torch.no_grad():
            mine, theirs = (model(ids, **{flag: True}) for model in (quick, plain))
        name = flag.removeprefix("output_")
        assert len(mine[name]) == len(theirs[name]) == count
        for one, other in zip(mine[name], theirs[name], strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_hooks_see_what_passes(ready: tuple[Any, Any]) -> None:
    _, quick = ready
    seen = []
    layer = quick.model.layers[1]
    handle = layer.self_attn.q_proj.register_forward_hook(lambda *given: seen.append(given))
    with torch.no_grad():
        logits(quick, ids_of(1, 4))
        handle.remove()
        logits(quick, ids_of(1, 4))
    assert len(seen) == 1


def test_weights_that_change_are_the_ones_that_run(ready: tuple[Any, Any]) -> None:
    plain, quick = ready
    ids = ids_of(1, 5)
    with torch.no_grad():
        for model in (plain, quick):
            model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
            model.model.layers[1].mlp.gate.weight = nn.Parameter(
                model.model.layers[1].mlp.gate.weight.flip(0)
            )
            model.model.layers[2].input_layernorm.weight.data = torch.rand(
                32, generator=torch.Generator().manual_seed(0)
            )
        assert torch.allclose(logits(quick, ids), logits(plain, ids), atol=1e-5)


def test_linear_layers_packed_afterwards_run(ready: tuple[Any, Any]) -> None:
    plain, quick = ready
    for model in (plain, quick):
        pack_linears(model, bits=4, group_size=8)
    ids = ids_of(1, 5)
    with torch.no_grad():
        found = logits(quick, ids)
        with using("torch"):
            expected = logits(plain, ids)
    assert torch.allclose(found, expected, atol=1e-4)


def test_copies_and_pickles_run(ready: tuple[Any, Any]) -> None:
    plain, quick = ready
    ids = ids_of(1, 5)
    with torch.no_grad():
        expected = logits(plain, ids)
        for other in (copy.deepcopy(quick), pickle.loads(pickle.dumps(quick))):
            for parameter in quick.model.layers[0].parameters():
                assert parameter is not other.model.layers[0].self_attn.q_proj.weight
            assert isinstance(other.model.layers[0], QuickLayer)
            assert torch.allclose(logits(other, ids), expected, atol=1e-5)
    assert quick.state_dict().keys() == plain.state_dict().keys()
    assert type(quick.model.layers[0]).__name__ == type(plain.model.layers[0]).__name__


def test_exact_results_do_not_depend_on_the_batch(ready: tuple[Any, Any]) -> None:
    _, quick = ready
    ids = ids_of(4, 5)
    with torch.no_grad(), using("exact"):
        layer = quick.model.layers[0].mlp
        x = torch.randn(1, 80, 32, generator=torch.Generator().manual_seed(0))
        together, alone = layer(x), layer(x[:, :3])
        assert torch.equal(together[:, :3], alone)
        assert torch.isfinite(logits(quick, ids)).all()


def test_a_cache_that_was_shown_is_not_written_over(ready: tuple[Any, Any]) -> None:
    plain, quick = ready
    ids = ids_of(2, 12)
    caches = []
    with torch.no_grad():
        for model in (plain, quick):
            cache = DynamicCache()
            logits(model, ids[:, :6], **with_cache(cache))
            logits(model, ids[:, 6:7], **with_cache(cache))
            before = cache.layers[0].keys
            kept = before.clone()
            branch = copy.deepcopy(cache)
            cache.crop(-2)
            logits(model, ids[:, 8:9], **with_cache(cache))
            logits(model, ids[:, 9:10], **with_cache(branch))
            cache.reorder_cache(torch.tensor([1, 0]))
            logits(model, ids[:, 10:11], **with_cache(cache))
            assert torch.equal(before, kept)
            caches.append((cache, branch))
    for mine, theirs in zip(caches[1], caches[0], strict=True):
        for one, other in zip(mine.layers, theirs.layers, strict=True):
            assert one.keys.shape == other.keys.shape
            assert torch.allclose(one.keys, other.keys, atol=1e-5)
            assert torch.allclose(one.values, other.values, atol=1e-5)


def test_a_model_that_is_let_go_goes() -> None:
    _, quick = pair("olmoe")
    ids = ids_of(1, 8)
    in_steps(quick, ids, torch.ones_like(ids), 5, "fast")
    gone = [weakref.ref(quick), weakref.ref(quick.model), weakref.ref(quick.model.layers[0])]
    del quick
    gc.collect()
    assert [one() for one in gone] == [None] * 3


@pytest.mark.parametrize("num", [2, 16, 64, 65])
def test_several_tokens_behind_a_cache(num: int) -> None:
    plain, quick = pair("olmoe")
    found = []
    ids = ids_of(1, 5 + num)
    for model, mode in ((plain, "torch"), (quick, "fast")):
        with torch.no_grad(), using(mode):
            cache = returned_cache(model(ids[:, :5], use_cache=True))
            found.append(logits(model, ids[:, 5:], **with_cache(cache)))
    assert error(found[1], found[0], torch.ones(1, num)) < 1e-5
