"""What the prefetcher coactivation promises beyond its kind's contract."""

from __future__ import annotations

from mixtura.methods.caches import Key
from mixtura.methods.prefetchers import Sight
from mixtura.methods.prefetchers.coactivation import Coactivation


def sight(layer: int, *experts: int) -> Sight:
    return Sight(layer, experts, (3, 4, 3), lambda later: None)


def test_chances_and_not_counts_are_added_up() -> None:
    method = Coactivation(most=2)
    # Expert 0 was seen a hundred times as often as expert 1, which says nothing of what follows it.
    method.learn({0: [[600.0, 400.0, 0.0, 0.0], [0.0, 3.0, 7.0, 0.0], [0.0, 0.0, 0.0, 0.0]]})
    assert method.guess(sight(0, 0, 1)) == [Key(1, 1), Key(1, 2)]
    assert method.guess(sight(0, 0)) == [Key(1, 0), Key(1, 1)]


def test_what_was_not_recorded_is_not_guessed() -> None:
    method = Coactivation()
    assert list(method.guess(sight(0, 1))) == []
    method.learn({0: [[1.0] * 4] * 3})
    assert list(method.guess(sight(1, 1))) == []
    assert list(method.guess(sight(2, 1))) == []
