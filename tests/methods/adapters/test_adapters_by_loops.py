"""LoRA experts against plain loops over tokens and experts, written from the papers and their code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from methods.adapters.adapter_sites import linear_site
from torch import Tensor

from mixtura.adapting.changing import add_to_rows
from mixtura.methods import load_method
from mixtura.methods.adapters._shared import LoraExperts
from mixtura.types import RouterInput

METHODS = ("dyn_mole", "lora_mixer", "lora_moe", "mo_r", "moe_lora", "mola")
VALID = torch.tensor([True] * 5 + [False] * 2)
X = torch.randn(7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made_of(method: str, **settings: Any) -> LoraExperts:
    """An adapter of the third of four layers whose parameters all matter."""
    adapter = load_method("adapters", method)(linear_site(2), rank=3, alpha=5.0, **settings).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.4)
    assert isinstance(adapter, LoraExperts)
    return adapter


def softmax(logits: list[float]) -> list[float]:
    """Probabilities."""
    powers = [math.exp(one) for one in logits]
    return [one / sum(powers) for one in powers]


def dot(one: Tensor, other: Tensor) -> float:
    """The sum of products."""
    return sum(a * b for a, b in zip(one.tolist(), other.tolist(), strict=True))


def gated(made: LoraExperts, x: Tensor) -> list[float]:
    """What one gate says of a token, or what several say as another weighs them."""
    if hasattr(made, "gate"):
        return softmax([dot(row, x) for row in made.gate])
    router: Any = made.router
    say = softmax([dot(row, x) for row in router.main])
    votes = [softmax([dot(row, x) for row in one]) for one in router.routers]
    return [sum(s * v[e] for s, v in zip(say, votes, strict=True)) for e in range(made.num_experts)]


def best(scores: list[float], top_k: int) -> list[float]:
    """The highest scores over their sum."""
    order = sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k]
    whole = sum(scores[e] for e in order)
    return [score / whole if e in order else 0.0 for e, score in enumerate(scores)]


def tsallis(scores: list[float], q: float) -> float:
    """Over its greatest value."""
    count = len(scores)
    found = (1 - sum((p + 1e-5) ** q for p in scores)) / (q - 1)
    return found / ((1 - count ** (1 - q)) / (q - 1))


def few(scores: list[float], top_p: float, least: int) -> list[float]:
    """As DynMoLE has it: those before the sum passes, the crossing one left out; all where it is unsure."""
    if tsallis(scores, 1.1) > 0.9:
        return scores
    kept, total = [0.0] * len(scores), 0.0
    for place, e in enumerate(sorted(range(len(scores)), key=lambda e: -scores[e])):
        total += scores[e]
        if place < least or total <= top_p:
            kept[e] = scores[e]
    return kept


def shares_of(method: str, made: LoraExperts, x: Tensor, *, training: bool) -> list[float]:
    """One token's shares."""
    scores = gated(made, x)
    if method == "lora_moe" or (method == "lora_mixer" and training):
        return scores
    if method == "dyn_mole":
        return few(scores, 0.75, 2)
    return best(scores, 3 if method == "lora_mixer" else 2)


def switch(scores: list[list[float]], chosen: list[list[float]]) -> float:
    """M times the sum of each expert's share of the choices and its mean score."""
    counts = [sum(row[e] > 0 for row in chosen) for e in range(len(scores[0]))]
    means = [sum(row[e] for row in scores) / len(scores) for e in range(len(scores[0]))]
    return len(counts) * sum(c / sum(counts) * m for c, m in zip(counts, means, strict=True))


def losses_of(method: str, made: LoraExperts, rows: list[Tensor]) -> dict[str, float]:
    """All losses of tokens that are no padding."""
    scores = [gated(made, x) for x in rows]
    number = len(rows)
    means = [sum(row[e] for row in scores) / number for e in range(made.num_experts)]
    if method == "dyn_mole":
        kept = [few(row, 0.75, 2) for row in scores]
        held = [sum(row[e] for row in kept) / number for e in range(made.num_experts)]
        even = made.num_experts * sum(a * b for a, b in zip(held, means, strict=True))
        return {"entropy": 0.01 * sum(tsallis(row, 1.1) for row in scores) / number, "balance": 0.001 * even}
    if method == "lora_moe":
        mean = sum(means) / len(means)
        return {"balance": 0.1 * sum((one - mean) ** 2 for one in means) / len(means) / mean}
    top = 3 if method == "lora_mixer" else 2
    found = {"balance": 0.01 * switch(scores, [best(row, top) for row in scores])}
    if method == "lora_mixer":
        nats = [-sum(p * math.log(p) for p in row) for row in scores]
        found["entropy"] = 0.01 * sum(nats) / number
    return found


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_added_is_that_of_a_loop(method: str, training: bool) -> None:
    made = made_of(method)
    assert made.num_experts == {"mola": 6, "lora_moe": 6, "dyn_mole": 8}.get(method, 4)
    change = made.change(RouterInput.of(X, training=training, valid=VALID))
    found = add_to_rows(torch.zeros(7, 20, dtype=torch.float64), X, change, None)
    wanted = torch.zeros_like(found)
    for token, x in enumerate(X):
        shares = shares_of(method, made, x, training=training)
        for expert, share in enumerate(shares):
            wanted[token] += share * 5.0 / 3 * (made.b[expert] @ (made.a[expert] @ x))
    # What padding gets is nobody's business.
    torch.testing.assert_close(found[VALID], wanted[VALID], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_a_loop(method: str) -> None:
    made = made_of(method, **({"balance": 0.01} if method == "mola" else {}))
    found = made.change(RouterInput.of(X, training=True, valid=VALID)).losses
    wanted = losses_of(method, made, list(X[VALID]))
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_part_without_any_text_has_no_loss_and_no_gradient(method: str) -> None:
    made = made_of(method, **({"balance": 0.01} if method == "mola" else {}))
    nothing = RouterInput.of(X, training=True, valid=torch.zeros(7, dtype=torch.bool))
    losses = made.change(nothing).losses
    assert losses
    assert all(loss.item() == 0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    grads = [parameter.grad for parameter in made.parameters() if parameter.grad is not None]
    assert all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("method", METHODS)
def test_a_single_token_and_as_few_experts_as_there_can_be(method: str) -> None:
    settings: dict[str, Any] = {"num_experts": 1} if method != "mola" else {"experts_by_depth": [1]}
    if method == "dyn_mole":
        settings = {"num_experts": 2}
    if method in ("mo_r", "moe_lora", "lora_mixer"):
        settings["top_k"] = 1
    made = made_of(method, **settings)
    shares = made.change(RouterInput.of(X[:1])).shares
    assert shares is not None
    torch.testing.assert_close(shares.sum(-1), torch.ones(1, dtype=torch.float64))
