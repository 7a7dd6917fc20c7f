"""The predictor that learns paths while the model runs."""

from __future__ import annotations

import random

import pytest

from mixtura.errors import SettingError
from mixtura.methods.caches import Key
from mixtura.methods.prefetchers import Sight
from mixtura.methods.prefetchers.routing_path import RoutingPath

LAYERS = (6, 6, 6)


def share_right(method: RoutingPath, paths: list[tuple[int, int, int]]) -> float:
    """Of the guesses for the last third of some tokens, the share that was right."""
    right: list[bool] = []
    for path in paths:
        guessed: list[Key] = []
        for layer, expert in enumerate(path):
            if layer:
                right.append(guessed == [Key(layer, expert)])
            guessed = list(method.guess(Sight(layer, (expert,), LAYERS, lambda later: None)))
        assert not guessed
    tail = right[-len(right) // 3 :]
    return sum(tail) / len(tail)


def test_it_learns_what_follows_what() -> None:
    drawn = random.Random(0)
    paths = []
    for _ in range(150):
        first = drawn.randrange(6)
        paths.append((first, (first + 2) % 6, (5 * first + 1) % 6))
    assert share_right(RoutingPath(), paths) > 0.95
    # Where nothing follows from anything there is nothing to learn.
    loose = [(drawn.randrange(6), drawn.randrange(6), drawn.randrange(6)) for _ in range(150)]
    assert share_right(RoutingPath(), loose) < 0.5


def test_two_layers_back_say_what_one_does_not() -> None:
    drawn = random.Random(1)
    # The middle layer tells nothing of the first, on which the last depends.
    paths = [(first := drawn.randrange(6), 0, first) for _ in range(200)]
    last_right = [share_right(RoutingPath(depth=depth), paths) for depth in (1, 2)]
    assert last_right[1] > 0.95
    assert last_right[0] < 0.75


def test_the_last_token_is_read_too() -> None:
    # The last layer's expert is that of the token before, one further on.
    paths = [(0, 0, token % 6) for token in range(200)]
    assert share_right(RoutingPath(depth=1), paths) > 0.95


def test_least_leaves_out_what_is_unlikely() -> None:
    method = RoutingPath(least=0.6)
    assert not method.guess(Sight(0, (1,), LAYERS, lambda layer: None))
    for _ in range(30):
        method.guess(Sight(0, (1,), LAYERS, lambda layer: None))
        method.guess(Sight(1, (4,), LAYERS, lambda layer: None))
    assert method.guess(Sight(0, (1,), LAYERS, lambda layer: None)) == [Key(1, 4)]


@pytest.mark.parametrize("given", [{"depth": 0}, {"rate": 0.0}, {"least": -1.0}])
def test_settings_out_of_range(given: dict[str, float]) -> None:
    with pytest.raises(SettingError):
        RoutingPath(**given)  # type: ignore[arg-type]


def test_what_it_takes_is_said_beforehand() -> None:
    method, layers = RoutingPath(depth=2), (4, 6, 3, 5)
    for layer in range(len(layers)):
        method.guess(Sight(layer, (0,), layers, lambda later: None))
    held = sum(one.numel() * one.element_size() for one in method._weights.values())
    assert method.num_bytes(layers, 8) == held > 0
