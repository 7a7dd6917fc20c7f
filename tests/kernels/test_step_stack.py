"""Whole decode steps in one call: nothing that is kept from step to step outlives what it was made of."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from whole_steps import assert_same_steps, generated, ids_of, ready_pair, started, step

from mixtura.kernels import PackedLinear, isas, pack_linears, register_backend, using
from mixtura.kernels.step_watch import Unchanged
from mixtura.machine.releases import with_cache

register_backend()
compiled = bool(isas())


@pytest.fixture
def ready() -> tuple[Any, Any]:
    return ready_pair()


def replace_parameter(module: nn.Module, name: str) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(torch.rand(old.shape, generator=generated(5)) * 0.2))


def exchange_data(module: Any, name: str) -> None:
    old = getattr(module, name)
    old.data = torch.rand(old.shape, generator=generated(6)) * 0.2


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def double_class(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj.__class__ = Doubled


def double_forward(module: Any) -> None:
    own = module.forward
    module.forward = lambda *given, **named: 2 * own(*given, **named)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a parameter": lambda model: replace_parameter(model.model.layers[1].self_attn.q_proj, "weight"),
    "a router": lambda model: replace_parameter(model.model.layers[0].mlp.gate, "weight"),
    "data": lambda model: exchange_data(model.model.layers[2].mlp.experts, "down_proj"),
    "the embeddings' data": lambda model: exchange_data(model.model.embed_tokens, "weight"),
    "the last norm": lambda model: replace_parameter(model.model.norm, "weight"),
    "numbers in place": lambda model: model.model.layers[0].self_attn.o_proj.weight.mul_(1.5),
    "a class": double_class,
    "a forward of a linear layer": lambda model: double_forward(model.model.layers[1].self_attn.o_proj),
    "a forward of a layer": lambda model: double_forward(model.model.layers[1]),
    "a forward of the embeddings": lambda model: double_forward(model.model.embed_tokens),
    "the order of layers": lambda model: model.model.layers.insert(0, model.model.layers.pop(0)),
    "the implementation of experts": lambda model: model.set_experts_implementation("eager"),
    "the implementation of attention": lambda model: model.set_attn_implementation("eager"),
    "a linear layer packed": lambda model: pack_linears(
        model, bits=8, wanted=lambda name: name.endswith("layers.1.self_attn.k_proj")
    ),
    "experts for each token": lambda model: setattr(model.model.layers[1].mlp.gate, "top_k", 1),
    "the norm of weights": lambda model: setattr(
        model.model.layers[1].mlp.gate, "norm_topk_prob", not model.model.layers[1].mlp.gate.norm_topk_prob
    ),
    "a norm's epsilon": lambda model: setattr(model.model.layers[1].input_layernorm, "variance_epsilon", 0.5),
    "the last norm's epsilon": lambda model: setattr(model.model.norm, "variance_epsilon", 0.5),
    "the scaling of scores": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.9),
    "the scaling of rotations": lambda model: setattr(model.model.rotary_emb, "attention_scaling", 1.7),
    "frequencies in place": lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
    "frequencies behind autograd's back": lambda model: model.model.rotary_emb.inv_freq.data.mul_(0.5),
    "an activation": lambda model: setattr(model.model.layers[1].mlp.experts, "act_fn", nn.GELU()),
    "a window": lambda model: setattr(model.config, "sliding_window", 4),
    "a copy of the configuration": lambda model: setattr(model.model, "config", copy.copy(model.config)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_is_seen(ready: tuple[Any, Any], change: str) -> None:
    assert_same_steps(*ready, CHANGES[change])


@pytest.mark.parametrize("name", ["layers.1", "layers.0.mlp.gate", "layers.2.self_attn.q_proj", "norm"])
def test_hooks_between_steps_are_called_until_they_go(ready: tuple[Any, Any], name: str) -> None:
    _, quick = ready
    ids, seen = ids_of(1, 10), []
    with torch.no_grad():
        cache = started(quick, ids[:, :6])
        step(quick, ids[:, 6:7], cache)
        handles = [
            quick.model.get_submodule(name).register_forward_hook(lambda *given: seen.append(given)),
            quick.model.get_submodule(name).register_forward_pre_hook(lambda *given: seen.append(given)),
        ]
        step(quick, ids[:, 7:8], cache)
        assert len(seen) == 2
        for handle in handles:
            handle.remove()
        step(quick, ids[:, 8:9], cache)
        shared = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        step(quick, ids[:, 9:10], cache)
        shared.remove()
    assert any(one is quick.model.layers[2].self_attn.q_proj for one in seen[2:])


def test_an_observer_between_steps_sees_assignments(ready: tuple[Any, Any]) -> None:
    _, quick = ready
    ids, seen = ids_of(1, 8), []

    class Observer:
        def start(self, *given: Tensor) -> None:
            seen.append(given)

        def expert(self, *given: Any) -> None:
            pass

        def finish(self) -> None:
            pass

    with torch.no_grad():
        cache = started(quick, ids[:, :6])
        step(quick, ids[:, 6:7], cache)
        quick.model.layers[1].mlp.experts.mixtura_observer = Observer()
        step(quick, ids[:, 7:8], cache)
    assert len(seen) == 1


def test_flags_switched_between_steps_are_heeded(ready: tuple[Any, Any]) -> None:
    plain, quick = ready
    ids = ids_of(1, 9)
    found = []
    for model in (plain, quick):
        with torch.no_grad():
            cache = started(model, ids[:, :6])
            step(model, ids[:, 6:7], cache)
            model.config.output_hidden_states = True
            output = model(ids[:, 7:8], **with_cache(cache))
            model.config.output_hidden_states = False
            found.append((*output.hidden_states, step(model, ids[:, 8:9], cache)))
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_caches_used_in_turns_do_not_mix(ready: tuple[Any, Any]) -> None:
    plain, quick = ready
    found = []
    for model, mode in ((plain, "torch"), (quick, "fast")):
        with torch.no_grad(), using(mode):
            caches = [started(model, ids_of(num, 4 + num, seed=num)) for num in (1, 2, 3)]
            caches.append(copy.deepcopy(caches[1]))
            logits = []
            for turn in range(4):
                for index, cache in enumerate(caches):
                    num = cache.layers[0].keys.shape[0]
                    logits.append(step(model, ids_of(num, 1, seed=10 * turn + index), cache))
                caches.append(copy.deepcopy(caches[turn]))
                caches[0] = pickle.loads(pickle.dumps(caches[0]))
            found.append(logits)
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_threads_do_not_mix(ready: tuple[Any, Any]) -> None:
    _, quick = ready

    def decode(seed: int) -> Tensor:
        # Across the end of a block of places, whose tables then make room for the next.
        ids = ids_of(1, 260, seed=seed)
        with torch.no_grad():
            cache = started(quick, ids[:, :250])
            return torch.cat([step(quick, ids[:, t : t + 1], cache) for t in range(250, 260)])

    expected = [decode(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(decode, range(4))]
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_decoding_itself_changes_nothing(ready: tuple[Any, Any]) -> None:
    _, quick = ready
    if not compiled:
        return
    unchanged = Unchanged(quick.model, hooks=True)
    quick.generate(ids_of(2, 6), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert unchanged.holds_for(quick.model)
    del quick.model.layers[1].mlp.experts.config
    assert not unchanged.holds_for(quick.model)


def test_what_a_cache_showed_stays(ready: tuple[Any, Any]) -> None:
    _, quick = ready
    ids = ids_of(2, 12)
    with torch.no_grad():
        cache = started(quick, ids[:, :6])
        shown = []
        for t in range(6, 12):
            step(quick, ids[:, t : t + 1], cache)
            keys = cache.layers[1].keys
            assert keys.shape[2] == (t + 1 if t < 10 else t)
            shown.append((keys, keys.clone()))
            if t == 9:
                cache.crop(-1)
    assert all(torch.equal(keys, kept) for keys, kept in shown)


def test_keys_shortened_in_place_are_heeded(ready: tuple[Any, Any]) -> None:
    plain, quick = ready
    ids = ids_of(2, 9)
    found = []
    for model in (plain, quick):
        with torch.no_grad():
            cache = started(model, ids[:, :6])
            step(model, ids[:, 6:7], cache)
            for layer in cache.layers:
                layer.keys.data, layer.values.data = layer.keys[:, :, :-2], layer.values[:, :, :-2]
            found.append(step(model, ids[:, 7:8], cache))
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("mode", ["exact", "torch"])
def test_options_switched_between_steps_are_heeded(ready: tuple[Any, Any], mode: str) -> None:
    plain, quick = ready
    ids = ids_of(2, 12)
    found = []
    for model in (plain, quick):
        with torch.no_grad():
            cache = started(model, ids[:, :6])
            logits = []
            for t in range(6, 12):
                with using(mode if t % 2 else "fast", isa=isas()[0] if isas() and t % 3 else None):
                    logits.append(step(model, ids[:, t : t + 1], cache))
            found.append(torch.cat(logits))
    assert torch.allclose(*found, atol=1e-5)


def test_a_result_is_as_transformers_makes_it(ready: tuple[Any, Any]) -> None:
    _, quick = ready
    ids = ids_of(2, 7)
    with torch.no_grad():
        cache = started(quick, ids[:, :6])
        mine = quick.model(ids[:, 6:], **with_cache(cache))
    theirs = type(mine)(last_hidden_state=mine.last_hidden_state, **with_cache(cache))
    assert [*mine] == [*theirs]
    assert vars(mine) == vars(theirs)
    assert [*map(id, mine.to_tuple())] == [*map(id, theirs.to_tuple())]
    again = pickle.loads(pickle.dumps(mine))
    assert torch.equal(again["last_hidden_state"], mine[0])


@pytest.mark.parametrize("wrong", [-1, 64, 10**9])
def test_ids_without_an_embedding_are_refused(ready: tuple[Any, Any], wrong: int) -> None:
    _, quick = ready
    with torch.no_grad():
        cache = started(quick, ids_of(1, 6))
        length = cache.get_seq_length()
        with pytest.raises(IndexError):
            step(
                quick, torch.full((1, 1), max(wrong, quick.config.vocab_size) if wrong > 0 else wrong), cache
            )
        assert cache.get_seq_length() == length


def test_a_packed_layer_reads_what_it_now_has() -> None:
    def one(seed: int) -> PackedLinear:
        linear = nn.Linear(64, 24, bias=False)
        linear.weight.data = torch.randn(24, 64, generator=generated(seed))
        return PackedLinear.of(linear, bits=4, group_size=16)

    x = torch.randn(2, 64, generator=generated(0))
    packed, other, third = one(1), one(2), one(3)
    packed(x)
    twin = copy.deepcopy(packed)
    packed.codes.data, packed.scales.data = other.codes.clone(), other.scales.clone()
    assert torch.equal(packed(x), other(x))
    assert torch.equal(twin(x), one(1)(x))
    twin.codes, twin.scales = third.codes, third.scales
    assert torch.equal(twin(x), third(x))
    assert torch.equal(pickle.loads(pickle.dumps(twin))(x), third(x))
    third.codes.data = third.codes.data[:8]
    third.scales.data = third.scales.data[:8]
    assert third(x).shape == (2, 8)
    x = torch.randn(3, 2, 64, generator=generated(4)).transpose(0, 1)
    assert torch.allclose(packed(x), other(x.contiguous()))
