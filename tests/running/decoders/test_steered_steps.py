"""Steps that are steered inside one compiled call, beside the same ones steered by routers' seats."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import tiny_model
from torch import Tensor

from mixtura.authoring.contracts._decoded import model, tokenizer
from mixtura.kernels import isas, quicken, register_backend
from mixtura.kernels.paths import paths_of
from mixtura.kernels.step_steering import Sizes, UnsteeredError, steered_step, steering_steps
from mixtura.machine.releases import returned_cache, with_cache
from mixtura.methods.decoders import LayerFacts, ModelFacts
from mixtura.running.decoders import stepping
from mixtura.running.decoders.entry import decode
from mixtura.running.decoders.facts import facts_of, steered
from mixtura.running.decoders.steering import Steerer
from mixtura.running.decoders.stepping import Stepping
from mixtura.types.steering import Steering

register_backend()
pytestmark = pytest.mark.skipif(not isas(), reason="the compiled kernels are missing")

# Softmax of all with and without normalising, of the chosen, sigmoids with corrections.
FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "dots1", "ernie4_5_moe")
ROWS = 3


def quick(family: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> Any:
    from family_sizes import SIZES

    for name in ("n_group", "topk_group"):
        monkeypatch.setitem(SIZES, name, 1)
    made: Any = tiny_model(family, dtype=dtype)
    made.set_experts_implementation("mixtura")
    quicken(made)
    assert paths_of(made)[-1].path == "whole step"
    return made


@contextmanager
def seats_of(inside: Any) -> Iterator[tuple[ModelFacts, Steerer]]:
    found = steered(inside)
    steerer = Steerer(found)
    try:
        yield facts_of(inside, found), steerer
    finally:
        steerer.sit()
        steerer.remove()
        found.restore()


def random_fields(layer: LayerFacts, seed: int = 0) -> dict[str, Steering]:
    """One steering of each kind, other in each row."""
    draw = torch.Generator().manual_seed(seed + layer.index)
    experts = layer.num_experts
    some = torch.rand(ROWS, experts, generator=draw)
    half = some.argsort(-1) < max(experts // 2, layer.top_k)
    mixture = torch.rand(ROWS, experts, generator=draw)
    return {
        "logits": Steering(logits=torch.randn(ROWS, experts, generator=draw)),
        "spread": Steering(spread=some - 0.5),
        "highest": Steering(highest=some > 0.7),
        "mixture": Steering(mixture=mixture / mixture.sum(-1, keepdim=True), share=torch.tensor([0, 0.3, 1])),
        "bias": Steering(bias=torch.randn(ROWS, experts, generator=draw)),
        "allowed": Steering(allowed=half),
        "fewer": Steering(ranks=torch.tensor([[0, 1], [1, 2], [0, layer.top_k]])),
        "more": Steering(ranks=torch.tensor([[0, experts], [1, experts], [0, 1]])),
        "least": Steering(least=torch.tensor([0.0, 0.3, 0.6])),
        "scale": Steering(scale=2 * some),
        "all": Steering(
            logits=some, allowed=half, ranks=torch.tensor([[0, 2], [1, 2], [0, 1]]),
            least=torch.tensor([0.0, 0.1, 0.2]), scale=some,
        ),
    }  # fmt: skip


FIELDS = tuple(random_fields(LayerFacts(index=0, num_experts=8, top_k=2, scoring="softmax")))


def both_ways(
    inside: Any, make: Callable[[LayerFacts], Steering]
) -> tuple[tuple[Tensor, Mapping[int, Tensor]], tuple[Tensor, Mapping[int, Tensor]]]:
    """Logits of a steered step and experts left of each token, in a compiled call and by seats."""
    ids = torch.randint(3, 60, (ROWS, 7), generator=torch.Generator().manual_seed(1))
    made = []
    for by_seats in (False, True):
        with torch.no_grad(), seats_of(inside) as (facts, steerer):
            how = Stepping(inside, facts, steerer)
            how._stays = by_seats
            if by_seats:
                steerer.sit()
            cache = returned_cache(
                Stepping.read(how, lambda: inside(ids[:, :6], use_cache=True), {})
                if not by_seats
                else inside(ids[:, :6], use_cache=True)
            )

            def forward(cache: Any = cache) -> Tensor:
                logits: Tensor = inside(ids[:, 6:], use_cache=True, **with_cache(cache)).logits
                return logits

            made.append((how.step(forward, facts.steer_all(make), ROWS), dict(how.kept)))
            assert how._stays == by_seats, "the compiled step refused"
    return made[0], made[1]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_step_is_steered_as_seats_steer(
    family: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = quick(family, monkeypatch)
    (compiled, kept), (expected, left) = both_ways(inside, lambda layer: random_fields(layer)[field])
    torch.testing.assert_close(compiled, expected, rtol=2e-4, atol=2e-4)
    assert kept.keys() == left.keys()
    assert all(torch.equal(kept[index], left[index]) for index in kept)
    (plain, _), _ = both_ways(inside, lambda layer: Steering())
    assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-3)


def test_rounded_as_bfloat16_routers_round(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = quick("qwen3_moe", monkeypatch, torch.bfloat16)
    for field in ("logits", "scale", "fewer", "least"):
        (compiled, _), (expected, _) = both_ways(inside, lambda layer, one=field: random_fields(layer)[one])
        error = (compiled.float() - expected.float()).norm() / expected.float().norm()
        assert error < 0.03, field


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_that_changes_nothing_changes_no_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = quick(family, monkeypatch)

    def nothing(layer: LayerFacts) -> Steering:
        zeros = torch.zeros(layer.num_experts)
        return Steering(
            logits=zeros, spread=zeros, highest=zeros.bool(), mixture=zeros + 1 / layer.num_experts,
            share=torch.tensor(0.0), bias=zeros, allowed=zeros == 0, ranks=torch.tensor([0, layer.top_k]),
            least=torch.tensor(0.0), scale=zeros + 1,
        )  # fmt: skip

    (changed, _), _ = both_ways(inside, nothing)
    (plain, _), _ = both_ways(inside, lambda layer: Steering())
    assert torch.equal(changed, plain)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("scmoe", {}),
        ("scmoe", {"rank": 3, "beta": 1.0}),
        ("mask_experts", {"experts": [[0, 1], [1, 2]]}),
        ("des", {}),
    ],
)
def test_decoders_say_the_same_and_count_the_same(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quickened = copy.deepcopy(model())
    quickened.set_experts_implementation("mixtura")
    quicken(quickened)
    options: dict[str, Any] = {"max_new_tokens": 12}
    if name == "des":
        options["verifier"] = lambda prompt, texts: [float(len(text)) for text in texts]
    fast = decode(quickened, tokenizer(), "abcde", name, **options, **settings)
    monkeypatch.setattr(stepping, "has_stack", lambda inside: False)
    slow = decode(quickened, tokenizer(), "abcde", name, **options, **settings)
    assert fast.token_ids == slow.token_ids
    assert fast.cost == slow.cost


def test_prompts_of_unequal_lengths_go_on_by_seats(monkeypatch: pytest.MonkeyPatch) -> None:
    quickened = copy.deepcopy(model())
    quickened.set_experts_implementation("mixtura")
    quicken(quickened)
    texts = ["abc", "abcdefgh"]
    made = decode(quickened, tokenizer(), texts, "scmoe", max_new_tokens=8)
    alone = [decode(quickened, tokenizer(), one, "scmoe", max_new_tokens=8) for one in texts]
    assert [one.token_ids for one in made] == [one.token_ids for one in alone]


def test_a_model_is_as_it_was_also_after_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = quick("qwen3_moe", monkeypatch)
    before = [(name, dict(vars(module))) for name, module in inside.named_modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in inside.modules()]

    def broken() -> Tensor:
        raise ValueError("broken")

    def run() -> None:
        with seats_of(inside) as (facts, steerer):
            how = Stepping(inside, facts, steerer)
            assert all("forward" not in vars(module) for module in inside.modules())
            how.step(broken, facts.steer_all(lambda one: Steering(scale=torch.ones(one.num_experts))), 1)

    with pytest.raises(ValueError, match="broken"):
        run()
    assert [(name, dict(vars(module))) for name, module in inside.named_modules()] == before
    assert hooks == [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in inside.modules()
    ]


def test_what_no_compiled_call_does_is_never_run_unsteered(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = quick("qwen3_moe", monkeypatch)
    sizes = {0: Sizes(4, 2), 1: Sizes(4, 2)}
    assert steered_step({0: Steering(forced=torch.tensor([[0, 1]]))}, sizes, 1) is None
    step = steered_step({0: Steering(ranks=torch.tensor([0, 1]))}, sizes, 1)
    assert step is not None
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), pytest.raises(UnsteeredError), steering_steps(step):
        inside(ids)
    plain: Any = tiny_model("qwen3_moe")
    with torch.no_grad(), pytest.raises(RuntimeError, match="in one call"), steering_steps(step):
        plain(ids)
