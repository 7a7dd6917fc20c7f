"""The prefetcher that believes routers as far as they were right: what it counts, and what follows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mixtura.errors import SettingError
from mixtura.methods.caches import Key
from mixtura.methods.prefetchers import Sight
from mixtura.methods.prefetchers.impact import Impact

LAYERS = (4, 4, 4)
Gates = Callable[[int], tuple[float, ...] | None]


def shares(best: int) -> tuple[float, ...]:
    """A router that likes one expert."""
    return tuple(0.7 if expert == best else 0.1 for expert in range(4))


def test_the_nearest_layer_comes_first_of_what_is_as_likely() -> None:
    gates: Gates = lambda layer: shares(layer)  # noqa: E731
    assert Impact().guess(Sight(0, (3,), LAYERS, gates)) == [Key(1, 1), Key(2, 2)]
    assert Impact(distance=1).guess(Sight(0, (3,), LAYERS, gates)) == [Key(1, 1)]


def test_a_distance_that_was_wrong_is_believed_no_more() -> None:
    method = Impact(distance=2)
    # One layer ahead the routers are right, two layers ahead they are wrong.
    for _ in range(20):
        method.guess(Sight(0, (0,), LAYERS, lambda layer: shares(1 if layer == 1 else 3)))
        method.guess(Sight(1, (1,), LAYERS, lambda layer: shares(2)))
        method.guess(Sight(2, (2,), LAYERS, lambda layer: None))
    assert method.guess(Sight(0, (0,), LAYERS, lambda layer: shares(2))) == [Key(1, 2)]


def test_places_in_the_list_are_counted_apart() -> None:
    method = Impact(distance=1)
    # The expert that a router likes best is needed, the second never is.
    for _ in range(20):
        method.guess(Sight(0, (0, 1), LAYERS, lambda layer: (0.5, 0.3, 0.1, 0.1)))
        method.guess(Sight(1, (0, 3), LAYERS, lambda layer: None))
    assert method.guess(Sight(0, (0, 1), LAYERS, lambda layer: (0.5, 0.3, 0.1, 0.1))) == [Key(1, 0)]


def test_a_new_text_does_not_settle_the_guesses_of_the_last() -> None:
    method = Impact(distance=1)
    for _ in range(20):
        method.guess(Sight(0, (0,), LAYERS, lambda layer: shares(1)))
        method.begin()
        method.guess(Sight(1, (3,), LAYERS, lambda layer: None))
    assert method.guess(Sight(0, (0,), LAYERS, lambda layer: shares(1))) == [Key(1, 1)]


def test_without_hope_nothing_is_guessed_before_it_was_right() -> None:
    method = Impact(distance=1, hope=0.0)
    for _ in range(4):
        assert not method.guess(Sight(0, (0,), LAYERS, lambda layer: shares(1)))
        method.guess(Sight(1, (1,), LAYERS, lambda layer: None))
    assert method.guess(Sight(0, (0,), LAYERS, lambda layer: shares(1))) == [Key(1, 1)]


@pytest.mark.parametrize("given", [{"distance": 0}, {"least": 1.5}, {"hope": -0.1}])
def test_settings_out_of_range(given: dict[str, float]) -> None:
    with pytest.raises(SettingError):
        Impact(**given)  # type: ignore[arg-type]
