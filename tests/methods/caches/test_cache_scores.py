"""What the cache scores promises beyond its kind's contract."""

from __future__ import annotations

from mixtura.methods.caches import Call, Key
from mixtura.methods.caches.scores import Scores


def test_priorities_by_hand() -> None:
    cache = Scores(3, alpha=0.5, top=2)
    cache.see(Call(0, (0,), (1,), scores=(0.6, 0.3, 0.1)))
    cache.see(Call(0, (1,), (1,), scores=(0.1, 0.5, 0.4)))
    # 0: 0.3, then half; 1: 0.15, then 0.075 + 0.25; 2: not among the best two, then 0.2.
    for expert in range(3):
        cache.touch(0, expert)
    assert cache.touch(0, 3).evicted == Key(0, 0)
    # 3 has no priority at all, so it is the next to go.
    assert [cache.touch(0, 4).evicted, cache.touch(0, 5).evicted] == [Key(0, 3), Key(0, 4)]


def test_without_scores_the_share_of_the_tokens_counts() -> None:
    cache = Scores(2)
    cache.see(Call(1, (3, 5), (1, 9)))
    assert [cache.touch(1, expert).evicted for expert in (5, 3, 4)][-1] == Key(1, 3)


def test_layers_are_compared_with_each_other() -> None:
    cache = Scores(2)
    cache.see(Call(0, (0,), (1,), scores=(0.9, 0.1)))
    cache.see(Call(1, (0,), (1,), scores=(0.4, 0.6)))
    assert [cache.touch(layer, 0).evicted for layer in (0, 1, 2)][-1] == Key(1, 0)
