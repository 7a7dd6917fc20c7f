"""What the prefetcher next_gate promises beyond its kind's contract."""

from __future__ import annotations

from mixtura.methods.caches import Key
from mixtura.methods.prefetchers import Sight
from mixtura.methods.prefetchers.next_gate import NextGate

ASKED: list[int] = []


def gates(layer: int) -> tuple[float, ...]:
    ASKED.append(layer)
    return (0.1, 0.4, 0.2, 0.3)


def test_the_best_of_the_layer_in_question_best_first() -> None:
    sight = Sight(1, (0, 2), (4, 4, 4, 4), gates)
    assert NextGate().guess(sight) == [Key(2, 1), Key(2, 3)]
    assert NextGate(most=3, distance=2).guess(sight) == [Key(3, 1), Key(3, 3), Key(3, 2)]
    assert ASKED == [2, 3]


def test_behind_the_last_layer_no_router_is_asked() -> None:
    ASKED.clear()
    assert list(NextGate().guess(Sight(3, (0,), (4, 4, 4, 4), gates))) == []
    assert ASKED == []
