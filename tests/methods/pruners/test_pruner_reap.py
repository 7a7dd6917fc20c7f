"""What the pruner reap promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixtura.authoring.contracts import sample_trace
from mixtura.errors import UserError
from mixtura.methods.pruners.frequency import Frequency
from mixtura.methods.pruners.reap import Reap
from mixtura.methods.statistics.weighted_output_norm import WeightedOutputNorm
from mixtura.types import Budget
from mixtura.types.trace import Trace


def trace_of(counts: list[list[int]], means: list[list[float]]) -> Trace:
    """One layer of four experts in two domains with these counts and mean weighted norms."""
    trace = sample_trace(num_layers=1, num_experts=4, top_k=1)
    layer = replace(
        trace.layers[0],
        counts=torch.tensor(counts),
        statistics={"weighted_output_norm": torch.tensor(means)},
    )
    return replace(trace, layers=(layer,))


def test_a_rare_expert_with_large_effect_is_kept_where_frequency_drops_it() -> None:
    trace = trace_of([[100, 90, 80, 2], [0, 0, 0, 0]], [[1.0, 0.9, 0.1, 5.0], [0, 0, 0, 0]])
    assert Reap().plan(trace, Budget(num_experts=3)).dropped() == {0: (2,)}
    assert Frequency().plan(trace, Budget(num_experts=3)).dropped() == {0: (3,)}


def test_domains_are_pooled_by_their_tokens() -> None:
    # Means over both domains: 1.9, 1.1, 1.0, 1.2; the last domain alone would drop expert 0.
    trace = trace_of([[90, 50, 50, 40], [10, 50, 50, 60]], [[2.0, 1.0, 1.0, 0.0], [1.0, 1.2, 1.0, 2.0]])
    assert Reap().plan(trace, Budget(num_experts=3)).dropped() == {0: (2,)}


def test_equals_the_papers_formula_on_made_up_tokens() -> None:
    # S_j = 1 / |X_j| * sum over X_j of g_j(x) * ||f_j(x)||, computed token by token in a loop.
    generator = torch.Generator().manual_seed(3)
    outputs = torch.randn(4, 50, 8, generator=generator) * torch.tensor([1.0, 3.0, 0.5, 2.0])[:, None, None]
    gates = torch.rand(50, 4, generator=generator).softmax(-1)
    routed = torch.rand(50, 4, generator=generator) < 0.4
    scores, measured, counts = [], [], []
    for expert in range(4):
        mine = routed[:, expert].nonzero().flatten()
        terms = [gates[t, expert].item() * outputs[expert, t].norm().item() for t in mine]
        scores.append(sum(terms) / len(terms))
        numbers = WeightedOutputNorm().measure(
            outputs[expert, mine], outputs[expert, mine], gates[mine, expert]
        )
        measured.append(numbers.mean().item())
        counts.append(len(mine))
    assert measured == pytest.approx(scores, rel=1e-5)
    trace = trace_of([counts, [0] * 4], [measured, [0.0] * 4])
    worst = sorted(range(4), key=scores.__getitem__)[:2]
    assert Reap().plan(trace, Budget(num_experts=2)).dropped() == {0: tuple(sorted(worst))}


def test_an_expert_nothing_was_routed_to_goes_first() -> None:
    trace = trace_of([[5, 0, 5, 5], [5, 0, 5, 5]], [[0.1, 0.0, 0.2, 0.3], [0.1, 0.0, 0.2, 0.3]])
    assert Reap().plan(trace, Budget(num_experts=3)).dropped() == {0: (1,)}


def test_a_trace_without_the_statistic_says_how_to_get_it() -> None:
    trace = sample_trace()
    bare = replace(trace, layers=tuple(replace(layer, statistics={}) for layer in trace.layers))
    with pytest.raises(UserError, match=r"no statistic 'weighted_output_norm'.*observe again"):
        Reap().plan(bare, Budget(num_experts=4))


def test_a_score_that_is_not_finite_is_reported() -> None:
    trace = trace_of([[5, 5, 5, 5], [0, 0, 0, 0]], [[1.0, float("nan"), 1.0, 1.0], [0.0] * 4])
    with pytest.raises(UserError, match="layer 0 has a score that is not finite"):
        Reap().plan(trace, Budget(num_experts=3))


def test_renormalized_reads_its_own_statistic() -> None:
    trace = sample_trace(num_layers=1, num_experts=4, top_k=1).of("code")
    layer = replace(
        trace.layers[0],
        statistics={
            "weighted_output_norm": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
            "renormalized_output_norm": torch.tensor([[4.0, 3.0, 2.0, 1.0]]),
        },
        counts=torch.full((1, 4), 5),
    )
    trace = replace(trace, layers=(layer,))
    assert Reap().plan(trace, Budget(num_experts=3)).dropped() == {0: (0,)}
    assert Reap(renormalize=True).plan(trace, Budget(num_experts=3)).dropped() == {0: (3,)}
