"""Time at stated rates: by hand for small cases, and the arena that is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoints import save_tiny

from mixtura.checkpoints.view import open_model
from mixtura.errors import UnknownNameError
from mixtura.methods.caches import Call
from mixtura.methods.caches.lru import Lru
from mixtura.running.loading import load
from mixtura.running.tiers.ahead import room_for_guesses
from mixtura.running.tiers.cost import other_bytes
from mixtura.running.tiers.guessing import NONE, ORACLE, Guessed, as_csv, hold, markdown
from mixtura.running.tiers.recording import Recorded, record
from mixtura.running.tiers.simulation import Foresight, Rates, replay_timed

# Reading an expert from disk takes 1 s, multiplying it 0.1 s, and the rest of a layer 0.5 s.
RATES = Rates(disk_bytes_per_s=100.0, memory_bytes_per_s=1000.0, other_bytes=500.0)


def recorded(*tokens: tuple[tuple[int, ...], ...]) -> Recorded:
    """Choices of two layers with four experts each."""
    calls = tuple(
        Call(layer, experts, (1,) * len(experts)) for token in tokens for layer, experts in enumerate(token)
    )
    return Recorded((calls,), (4, 4), 2, 100, len(tokens))


def test_what_is_missing_is_waited_for() -> None:
    seen = recorded(((0, 1), (0, 1)), ((0, 1), (0, 2)))
    timed = replay_timed(seen, Lru(8), RATES)
    # First: both layers read two experts, the last of which is multiplied alone. Then one is missing.
    assert timed.token_ms == pytest.approx([2 * (2000 + 100 + 500), (200 + 500) + (1000 + 100 + 500)])
    assert timed.stall_ms == pytest.approx([2 * (2100 - 200), 1100 - 200])
    assert timed.statistics.demanded_bytes == 500
    assert timed.statistics.hits == 3
    assert timed.p99_stall_ms == pytest.approx(3800)


def test_multiplying_hides_reading() -> None:
    slow = Rates(disk_bytes_per_s=1000.0, memory_bytes_per_s=100.0, other_bytes=0.0)
    seen = recorded(((0, 1, 2), (0, 1, 2)), ((0, 1, 3), (0, 1, 2)))
    timed = replay_timed(seen, Lru(8), slow)
    # One of three is read within the time of multiplying the others, then multiplied: as long as all three.
    assert timed.token_ms[1] == pytest.approx(6000)


def test_guesses_use_what_time_the_disk_has() -> None:
    seen = recorded(((0, 1), (0, 1)), ((2, 3), (2, 3)), ((0, 1), (0, 1)))
    plain = replay_timed(seen, Lru(4), RATES)
    known = replay_timed(seen, Lru(4), RATES, Foresight(seen), 2)
    assert plain.statistics.prefetched_bytes == 0
    assert known.guessed > 0
    # Half a second of a layer is not enough for an expert of one: all come late, and still sooner.
    assert known.late == known.guessed
    assert sum(known.token_ms) < sum(plain.token_ms)
    quick = Rates(disk_bytes_per_s=1000.0, memory_bytes_per_s=1000.0, other_bytes=500.0)
    assert replay_timed(seen, Lru(4), quick, Foresight(seen), 2).late_share == 0


def test_room_for_guesses_is_little_beside_the_cache() -> None:
    assert room_for_guesses(4, 4, 2) == 0
    assert room_for_guesses(3, 8, 2) == 0
    assert room_for_guesses(8, 64, 2) == 1
    assert room_for_guesses(600, 6144, 8) == 8


def test_a_model_is_recorded_and_run(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    seen = record(model, 64, 0, outlook=1)
    assert {layers for outlook in seen.outlooks for layers in outlook} == {(0, 1), (1, 2)}
    assert seen.outlooks[0][0, 1].shape == (len(seen.texts[0]) // 3, 8)
    # Routers of these tokens choose as the model did.
    layers = open_model(load(model)).layers
    for number, layer in enumerate(layers):
        chosen = (seen.tokens[0][number] @ layer.router_weight().float().T).topk(seen.top_k).indices
        wanted = [call.experts for call in seen.texts[0] if call.layer == number]
        assert [tuple(sorted(row)) for row in chosen.tolist()] == wanted
    pairs = seen.pairs
    assert sum(map(sum, pairs[1])) == seen.num_tokens * seen.top_k**2
    assert other_bytes(model) > 0
    said: list[str] = []
    table = hold(model, ("next_gate", "pre_gate"), 1, 64, said.append)
    assert {one.name for one in table} == {NONE, ORACLE, "next_gate", "pre_gate"}
    for one in table:
        assert one.name != NONE or (one.gained[0] == 0 and one.wasted_bytes[0] == 0)
        assert one.name != ORACLE or one.gained[0] in (0.0, 1.0)
    with pytest.raises(UnknownNameError, match="did you mean 'next_gate'"):
        hold(model, ("next_gates",), 1, 64, said.append)


def test_the_page_has_everybody() -> None:
    table = [
        Guessed(name, 8, 0.25, [2.0, 4.0], [0.5, 0.7], [100.0, 0.0], [0.5, 0.5], [4.0, 2.0], [0.5, 0.1], 1)
        for name in (NONE, "mine")
    ]
    page = markdown(table, "a model", 2, 64)
    assert "| `mine` | 1.000 | 60.0% | 50 B | 50% | 1.00 | 30% | 1 of 2 |" in page
    assert as_csv(table).splitlines()[1] == "none,8,0.2500,0,2,0.5,100,0.5,4,0.5"
