"""What the placement locality promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import torch

from mixtura.authoring.contracts import sample_cluster, sample_trace
from mixtura.methods.placements import loads_of
from mixtura.methods.placements.locality import Locality
from mixtura.types.trace import Trace


def four_sequences(seed: int) -> Trace:
    """A trace of which each device gets a sequence."""
    return replace(sample_trace(seed, num_experts=6), sequence_lengths=(60,) * 4, sequence_domains=(0, 1) * 2)


def test_as_many_are_served_at_home_as_any_even_split_can() -> None:
    cluster = sample_cluster(2, 2)
    for seed in range(3):
        trace = four_sequences(seed)
        made = Locality().plan(trace, cluster)
        for layer, at in zip(trace.layers, made.layers, strict=True):
            loads = loads_of(trace, layer, 4)
            found = sum(float(loads[source, e]) for source in range(4) for e in range(6)
                        if cluster.node(at.owner(e)) == cluster.node(source))  # fmt: skip
            # Nodes get 4 and 2: the devices before the others get one more.
            best = max(
                float(loads[:2, list(first)].sum() + loads[2:].sum() - loads[2:, list(first)].sum())
                for first in combinations(range(6), 4)
            )
            assert found == best


def test_loads_are_those_of_the_sequences_on_each_device() -> None:
    trace = four_sequences(5)
    choices = trace.layers[1].choices
    assert choices is not None
    counted = torch.zeros(4, 6)
    for token in range(240):
        for expert in choices[token].tolist():
            counted[token // 60, expert] += 1
    assert torch.equal(loads_of(trace, trace.layers[1], 4), counted.double())
