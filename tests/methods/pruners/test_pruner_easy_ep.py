"""What the pruner easy_ep promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import torch

from mixtura.authoring.contracts import sample_trace
from mixtura.methods.pruners.easy_ep import EasyEp
from mixtura.types import Budget
from mixtura.types.trace import Trace


def trace_of(counts: list[list[int]], means: list[list[float]]) -> Trace:
    """One layer of four experts in two domains with these counts and mean contributions."""
    trace = sample_trace(num_layers=1, num_experts=4, top_k=1)
    layer = replace(
        trace.layers[0],
        counts=torch.tensor(counts),
        statistics={"output_norm_by_change": torch.tensor(means)},
    )
    return replace(trace, layers=(layer,))


def test_scores_are_sums_so_that_use_counts() -> None:
    # Sums: 4.0, 5.0, 6.0, 7.0; the means would drop expert 3.
    trace = trace_of([[4, 10, 20, 70], [0, 0, 0, 0]], [[1.0, 0.5, 0.3, 0.1], [0.0] * 4])
    assert EasyEp().plan(trace, Budget(num_experts=3)).dropped() == {0: (0,)}


def test_each_domain_has_the_same_say() -> None:
    # The long domain's sums are 100 times as large; each is divided by its own sum first, so that expert 3,
    # the second domain's own, stays and expert 2 goes: 0.4, 0.35, 0.25 + 0.1, 0.9.
    counts = [[400, 350, 250, 0], [0, 0, 1, 9]]
    trace = trace_of(counts, [[1.0] * 4, [1.0] * 4])
    assert EasyEp().plan(trace, Budget(num_experts=2)).dropped() == {0: (1, 2)}
    assert EasyEp().plan(trace.of("prose"), Budget(num_experts=2)).dropped() == {0: (2, 3)}
    assert EasyEp().plan(trace.of("code"), Budget(num_experts=2)).dropped() == {0: (0, 1)}
