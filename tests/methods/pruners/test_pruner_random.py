"""What the pruner random promises beyond its kind's contract."""

from __future__ import annotations

from collections import Counter

from mixtura.authoring.contracts import sample_trace
from mixtura.methods.pruners.random import Random
from mixtura.types import Budget


def test_seeds_differ_and_layers_differ() -> None:
    trace = sample_trace(num_layers=4, num_experts=16)
    first, second = (Random(seed=seed).plan(trace, Budget(num_experts=8)) for seed in (0, 1))
    assert first != second
    assert len(set(first.dropped().values())) == 4


def test_every_expert_is_equally_likely_to_go() -> None:
    trace = sample_trace(num_layers=1, num_experts=4)
    gone: Counter[int] = Counter()
    for seed in range(400):
        gone.update(Random(seed=seed).plan(trace, Budget(num_experts=2)).dropped()[0])
    # 200 expected, standard deviation 10.
    assert all(150 < gone[expert] < 250 for expert in range(4))
