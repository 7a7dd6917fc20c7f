"""The pre-gate that begins as the next layer's router and is tuned on what that chose."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import SettingError
from mixtura.methods.caches import Key
from mixtura.methods.prefetchers import Sight
from mixtura.methods.prefetchers.next_gate import NextGate
from mixtura.methods.prefetchers.pre_gate import PreGate

LAYERS = (6, 6)
WIDTH = 8


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sights(
    x: Float[Tensor, "T D"], copied: Float[Tensor, "E D"], true: Float[Tensor, "E D"]
) -> tuple[Sight, Sight]:
    """A pass: what the next router would make of this layer's tokens, and what it chose of its own."""
    shares = tuple((x @ copied.T).softmax(-1).mean(0).tolist())
    needed = tuple(sorted((x @ true.T).topk(2).indices.unique().tolist()))
    return Sight(0, (0, 1), LAYERS, lambda later: shares, x), Sight(1, needed, LAYERS, lambda later: None, x)


def test_untuned_it_is_the_next_gate() -> None:
    copied, true = drawn(6, WIDTH, seed=0), drawn(6, WIDTH, seed=1)
    plain, method = NextGate(), PreGate(rate=0.0)
    for token in range(20):
        first, second = sights(drawn(1, WIDTH, seed=10 + token), copied, true)
        assert list(method.guess(first)) == list(plain.guess(first))
        assert not method.guess(second)


def test_a_step_is_that_of_the_cross_entropy() -> None:
    """Against the gradient that autograd gives for the same gate written out."""
    copied, true = drawn(6, WIDTH, seed=0), drawn(6, WIDTH, seed=1)
    method, learned = PreGate(rate=0.3), torch.zeros(6, 1 + WIDTH, requires_grad=True)
    for token in range(12):
        x = drawn(3, WIDTH, seed=50 + token)
        first, second = sights(x, copied, true)
        guessed = list(method.guess(first))
        mean = x.mean(0)
        read = torch.cat([torch.ones(1), mean / mean.norm()])
        shares = first.gates(1)
        assert shares is not None
        logits = torch.tensor(shares).log() + learned @ read
        assert guessed == [Key(1, expert) for expert in logits.topk(2).indices.tolist()]
        method.guess(second)
        wanted = torch.zeros(6)
        wanted[list(second.experts)] = 1 / len(second.experts)
        (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, wanted), learned)
        learned = (learned - 0.3 * grad).detach().requires_grad_()
    torch.testing.assert_close(method._learned[1], learned.detach())


def test_it_comes_to_know_a_router_that_it_was_no_copy_of() -> None:
    copied, true = drawn(6, WIDTH, seed=0), drawn(6, WIDTH, seed=1)

    def right(method: PreGate | NextGate) -> float:
        found = []
        for token in range(600):
            first, second = sights(drawn(1, WIDTH, seed=100 + token), copied, true)
            guessed = {key.expert for key in method.guess(first)}
            method.guess(second)
            found.append(len(guessed & set(second.experts)) / 2)
        return sum(found[-150:]) / 150

    assert right(PreGate()) > right(NextGate()) + 0.2


def test_a_text_that_begins_between_teaches_nothing() -> None:
    copied, true = drawn(6, WIDTH, seed=0), drawn(6, WIDTH, seed=1)
    first, second = sights(drawn(1, WIDTH, seed=2), copied, true)
    method = PreGate()
    method.guess(first)
    method.begin()
    method.guess(second)
    assert not method._learned[1].any()


def test_what_it_takes_is_said_beforehand() -> None:
    method = PreGate()
    for layer in (0, 1, 2):
        method.guess(Sight(layer, (0,), (4, 6, 3), lambda later: None, torch.ones(1, WIDTH)))
    held = sum(one.numel() * one.element_size() for one in method._learned.values())
    assert method.num_bytes((4, 6, 3), WIDTH) == held > 0


def test_unknown_tokens_or_gates_leave_the_other() -> None:
    method = PreGate()
    assert not method.guess(Sight(0, (0,), LAYERS, lambda later: None))
    shares = (0.1, 0.2, 0.05, 0.3, 0.25, 0.1)
    assert method.guess(Sight(0, (0,), LAYERS, lambda later: shares)) == [Key(1, 3)]
    method = PreGate(most=3, least=0.24)
    assert method.guess(Sight(0, (0,), LAYERS, lambda later: shares)) == [Key(1, 3), Key(1, 4)]


@pytest.mark.parametrize("given", [{"rate": -1.0}, {"most": -1}, {"least": 1.5}])
def test_settings_out_of_range(given: dict[str, float]) -> None:
    with pytest.raises(SettingError):
        PreGate(**given)  # type: ignore[arg-type]
