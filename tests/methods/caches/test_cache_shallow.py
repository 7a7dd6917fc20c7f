"""What the cache shallow promises beyond its kind's contract."""

from __future__ import annotations

import torch

from mixtura.methods.caches import Key, replay
from mixtura.methods.caches.lru import Lru
from mixtura.methods.caches.shallow import Shallow


def test_the_first_layers_stay_when_a_text_passes_all_of_them() -> None:
    cache = Shallow(6)
    passes = [Key(layer, expert) for _ in range(4) for layer in range(5) for expert in range(2)]
    touches = replay(cache, passes)
    by_layer = [[t.hit for key, t in zip(passes, touches, strict=True) if key.layer == n] for n in range(5)]
    assert all(by_layer[0][2:])
    assert not any(by_layer[4])


def test_without_a_share_it_is_lru() -> None:
    generator = torch.Generator().manual_seed(0)
    accesses = [Key(int(e) % 3, int(e)) for e in torch.randint(0, 12, (300,), generator=generator)]
    assert replay(Shallow(5, share=0.0), accesses) == replay(Lru(5), accesses)


def test_the_share_is_a_limit() -> None:
    cache = Shallow(4, share=0.5)
    replay(cache, [Key(0, expert) for expert in range(4)])
    # Layer 0 has more than its share, so that its oldest goes.
    assert cache.touch(1, 0).evicted == Key(0, 0)
