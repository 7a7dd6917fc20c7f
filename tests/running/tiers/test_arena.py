"""The arena of caches: what is recorded is what the model chose, and replaying counts what a cache does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import save_tiny

from mixtura.errors import UnknownNameError
from mixtura.methods.caches import Call, Key, replay
from mixtura.methods.caches.belady import Belady
from mixtura.methods.caches.lru import Lru
from mixtura.running.tiers.arena import Standing, hold, replay_calls
from mixtura.running.tiers.page import as_csv, markdown
from mixtura.running.tiers.recording import Recorded, record


def recorded() -> Recorded:
    """Two texts whose tokens choose two of six experts in each of two layers."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(2):
        calls = []
        for _ in range(40):
            for layer in range(2):
                chosen = torch.randperm(6, generator=generator)[:2].sort().values
                calls.append(Call(layer, tuple(chosen.tolist()), (1, 1), None))
        texts.append(tuple(calls))
    return Recorded(tuple(texts), (6, 6), 2, 100, 80)


def test_replaying_counts_what_the_cache_does() -> None:
    seen = recorded()
    flat = [Key(call.layer, expert) for text in seen.texts for call in text for expert in call.experts]
    needed, hits = replay_calls(Lru(5), seen)
    # An expert of the same call is never the least recent where there is room for five.
    assert (needed, hits) == (len(flat), sum(touch.hit for touch in replay(Lru(5), flat)))
    assert replay_calls(Belady(5), seen) == (needed, sum(touch.hit for touch in replay(Belady(5), flat)))


def test_sizes_begin_with_what_is_active() -> None:
    assert recorded().sizes() == (3, 6, 9)
    assert recorded().counts[0][0] == sum(
        0 in call.experts for t in recorded().texts for call in t if not call.layer
    )


def test_a_model_is_recorded_and_raced(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    seen = record(model, 64, 0)
    assert sum(len(text) for text in seen.texts) == seen.num_tokens * len(seen.num_experts)
    for call in seen.texts[0]:
        assert call.scores is not None
        best = sorted(range(8), key=lambda expert: -call.scores[expert])  # type: ignore[index]
        # The family takes the highest shares of a softmax over all.
        assert call.experts == tuple(sorted(best[: seen.top_k]))
    said: list[str] = []
    table = hold(model, ("lfu",), 1, 64, said.append)
    assert {one.name for one in table} == {"belady", "lru", "lfu"}
    for size in {one.num_slots for one in table}:
        rates = {one.name: one.hit_rates[0] for one in table if one.num_slots == size}
        assert max(rates.values()) == rates["belady"]
    with pytest.raises(UnknownNameError, match="did you mean 'lru'"):
        hold(model, ("lrru",), 1, 64, said.append)


def test_the_page_has_every_cache_at_every_size() -> None:
    table = [Standing(name, 3, 0.25, [0.5, 0.7], [200.0, 100.0], [1.0, 1.5]) for name in ("belady", "mine")]
    page = markdown(table, "a model", 2, 64)
    assert "| 1 | `mine` | 60.0% | 10.0% | 150 B | 1.25 |" in page
    assert "|  | *belady* | 60.0% |" in page
    assert as_csv(table).splitlines()[1] == "belady,3,0.2500,0,0.50000,200.0,1.0000"
