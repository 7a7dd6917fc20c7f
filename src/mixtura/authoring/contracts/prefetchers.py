"""What every prefetcher promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from mixtura.authoring.contracts._core import Subject, require
from mixtura.methods.caches import Key
from mixtura.methods.prefetchers import Prefetcher, Sight

_NUM_EXPERTS = (8, 8, 6, 8)
_NUM_PASSES = 12


def arguments() -> tuple[()]:
    """Nothing."""
    return ()


def sample(method: Subject, seed: int) -> list[tuple[Sight, ...]]:
    """What is seen when some tokens pass all layers, one after the other."""
    del method
    generator = torch.Generator().manual_seed(seed)
    passes = []
    for _ in range(_NUM_PASSES):
        logits = [torch.randn(num, generator=generator) for num in _NUM_EXPERTS]
        shares = tuple(tuple(one.softmax(0).tolist()) for one in logits)
        chosen = [tuple(sorted(one.topk(2).indices.tolist())) for one in logits]
        passes.append(tuple(_sight(layer, chosen[layer], shares) for layer in range(len(_NUM_EXPERTS))))
    return passes


def use(prefetcher: Prefetcher, passes: list[tuple[Sight, ...]]) -> list[list[Key]]:
    """What is guessed at each layer of each pass, after a lesson."""
    prefetcher.learn(lesson())
    prefetcher.begin()
    return [list(prefetcher.guess(sight)) for layers in passes for sight in layers]


def lesson() -> dict[int, Sequence[Sequence[float]]]:
    """How often experts were followed by those of the next layer: mostly by the one of the same number."""
    return {
        layer: [
            [10.0 if other == expert else 1.0 / (1 + other) for other in range(_NUM_EXPERTS[layer + 1])]
            for expert in range(_NUM_EXPERTS[layer])
        ]
        for layer in range(len(_NUM_EXPERTS) - 1)
    }


def check_guesses_are_experts_to_come(method: Subject) -> None:
    """What is guessed exists, lies in a later layer or, for a next token, any, and is named once."""
    passes = sample(method, 10)
    sights = [sight for layers in passes for sight in layers]
    for sight, guessed in zip(sights, use(method.create(), passes), strict=True):
        require(len(set(guessed)) == len(guessed), f"layer {sight.layer}: an expert is guessed twice")
        for key in guessed:
            known = 0 <= key.layer < len(_NUM_EXPERTS) and 0 <= key.expert < _NUM_EXPERTS[key.layer]
            require(known, f"layer {sight.layer}: {key} does not exist")
            require(key.layer != sight.layer, f"layer {sight.layer} has its experts already, not to come")


def check_guesses_something(method: Subject) -> None:
    """After some passes there is something to guess, in all layers but the last."""
    guessed = use(method.create(), sample(method, 11))[-len(_NUM_EXPERTS) : -1]
    require(all(guessed), "a layer in the middle has no guess")


def check_the_last_layer_is_no_trouble(method: Subject) -> None:
    """Behind the last layer there may be nothing to guess, and that is no error; nor is one layer alone."""
    alone = Sight(0, (1,), (4,), gates=lambda layer: None)
    for key in method.create().guess(alone):
        require(key.layer == 0 and 0 <= key.expert < 4, f"{key} does not exist")


def check_unknown_gates_are_no_trouble(method: Subject) -> None:
    """Where a router cannot be asked there are fewer guesses, and no error."""
    for layers in sample(method, 12)[:2]:
        for sight in layers:
            method.create().guess(Sight(sight.layer, sight.experts, sight.num_experts, lambda layer: None))


def _sight(layer: int, chosen: tuple[int, ...], shares: tuple[tuple[float, ...], ...]) -> Sight:
    return Sight(layer, chosen, _NUM_EXPERTS, _Gates(shares))


@final
@dataclass(frozen=True)
class _Gates:
    """What routers think, comparable."""

    shares: tuple[tuple[float, ...], ...]

    def __call__(self, layer: int) -> tuple[float, ...]:
        return self.shares[layer]
