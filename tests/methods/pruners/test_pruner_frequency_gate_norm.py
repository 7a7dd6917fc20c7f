"""What the pruner frequency_gate_norm promises beyond its kind's contract: known criteria are its points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mixtura.authoring.contracts import sample_trace
from mixtura.errors import SettingError
from mixtura.methods.pruners.frequency import Frequency
from mixtura.methods.pruners.frequency_gate_norm import FrequencyGateNorm
from mixtura.methods.pruners.reap import Reap
from mixtura.types import Budget
from mixtura.types.trace import Trace

NUM_EXPERTS, NUM_TOKENS = 16, 300


def tokens(seed: int) -> tuple[Trace, list[list[tuple[float, float]]]]:
    """A trace of made-up tokens, and each expert's gates and norms token by token."""
    generator = torch.Generator().manual_seed(seed)
    liking = torch.randn(NUM_EXPERTS, generator=generator)
    chosen = (liking + torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=generator)).topk(2).indices
    gates = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator, dtype=torch.float64)
    norms = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator, dtype=torch.float64) ** 2
    held = [
        [(float(gates[t, e]), float(norms[t, e])) for t in range(NUM_TOKENS) if e in chosen[t].tolist()]
        for e in range(NUM_EXPERTS)
    ]
    counts = torch.tensor([[len(one) for one in held]])
    means = {
        "output_norm": [sum(n for _, n in one) / max(len(one), 1) for one in held],
        "weighted_output_norm": [sum(g * n for g, n in one) / max(len(one), 1) for one in held],
    }
    trace = sample_trace(num_layers=1, num_experts=NUM_EXPERTS).of("code")
    layer = replace(
        trace.layers[0],
        counts=counts,
        weight_sums=torch.tensor([[sum(g for g, _ in one) for one in held]], dtype=torch.float64),
        statistics={name: torch.tensor([values]) for name, values in means.items()},
    )
    return replace(trace, layers=(layer,)), held


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# By exponents, the criterion of an expert's gates and norms as papers write it.
POINTS: dict[tuple[int, int, int], Callable[[list[tuple[float, float]]], float]] = {
    (1, 0, 0): lambda one: len(one),
    (0, 1, 0): lambda one: mean([g for g, _ in one]),
    (1, 1, 0): lambda one: sum(g for g, _ in one),
    (0, 0, 1): lambda one: mean([n for _, n in one]),
    (1, 0, 1): lambda one: sum(n for _, n in one),
    (0, 1, 1): lambda one: mean([g * n for g, n in one]),
    (1, 1, 1): lambda one: sum(g * n for g, n in one),
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("seed", range(3))
def test_known_criteria_are_points_of_the_family(point: tuple[int, int, int], seed: int) -> None:
    trace, held = tokens(seed)
    scores = [POINTS[point](one) for one in held]
    frequency, gate, norm = point
    for kept in (4, 8, 12):
        plan = FrequencyGateNorm(frequency=frequency, gate=gate, norm=norm).plan(
            trace, Budget(num_experts=kept)
        )
        ranked = sorted(range(NUM_EXPERTS), key=lambda e: (-scores[e], e))
        assert plan.dropped() == {0: tuple(sorted(ranked[kept:]))}


@pytest.mark.parametrize("seed", range(3))
def test_frequency_and_reap_are_the_pruners_of_these_names(seed: int) -> None:
    trace = sample_trace(seed, num_layers=3, num_experts=16)
    for kept in range(2, 17):
        budget = Budget(num_experts=kept)
        frequency = FrequencyGateNorm(frequency=1, gate=0, norm=0).plan(trace, budget)
        assert frequency == Frequency().plan(trace, budget)
        assert FrequencyGateNorm(frequency=0, gate=1, norm=1).plan(trace, budget) == Reap().plan(
            trace, budget
        )


def test_a_power_of_the_whole_ranks_alike() -> None:
    trace, _ = tokens(7)
    for kept in (4, 8, 12):
        budget = Budget(num_experts=kept)
        once = FrequencyGateNorm().plan(trace, budget)
        assert once == FrequencyGateNorm(frequency=3, gate=3, norm=3).plan(trace, budget)


def test_what_is_not_shared_is_of_the_plain_mean() -> None:
    # Means of gate, norm and product: (0.5, 2, 1.5) and (0.5, 3, 1.2): gate * norm^2 = 1.5 * 2 and 1.2 * 3.
    trace = sample_trace(num_layers=1, num_experts=2, top_k=1).of("code")
    layer = replace(
        trace.layers[0],
        counts=torch.tensor([[4, 4]]),
        weight_sums=torch.tensor([[2.0, 2.0]]),
        statistics={
            "output_norm": torch.tensor([[2.0, 3.0]]),
            "weighted_output_norm": torch.tensor([[1.5, 1.2]]),
        },
    )
    trace = replace(trace, layers=(layer,))
    for norm, dropped in ((1, 1), (2, 0)):
        plan = FrequencyGateNorm(frequency=0, gate=1, norm=norm).plan(trace, Budget(num_experts=1))
        assert plan.dropped() == {0: (dropped,)}


def test_no_exponent_at_all_is_refused() -> None:
    with pytest.raises(SettingError, match="one of frequency, gate and norm"):
        FrequencyGateNorm(frequency=0, gate=0, norm=0)
