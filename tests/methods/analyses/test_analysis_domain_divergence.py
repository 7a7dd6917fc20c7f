"""What the analysis domain_divergence promises beyond its kind's contract."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mixtura.authoring.contracts import sample_trace
from mixtura.methods.analyses import Evidence
from mixtura.methods.analyses.domain_divergence import DomainDivergence, jensen_shannon
from mixtura.types.trace import Trace


def with_sums(*rows: list[float]) -> Trace:
    made = sample_trace(seed=0, num_layers=1, num_experts=len(rows[0]))
    sums = torch.tensor(rows, dtype=torch.float64)
    layer = replace(made.layers[0], weight_sums=sums, counts=sums.nan_to_num().long(), statistics={})
    return replace(made, layers=(layer,), domains=tuple("abcd"[: len(rows)]), num_tokens=(1,) * len(rows))


def by_definition(first: list[float], second: list[float]) -> float:
    one, other = ([value / sum(row) for value in row] for row in (first, second))
    total = 0.0
    for p, q in zip(one, other, strict=True):
        for value in (p, q):
            if value:
                total += value / 2 * math.log2(value / ((p + q) / 2))
    return total


def test_divergence_is_as_defined() -> None:
    rows = [3.0, 1.0, 0.0, 4.0], [1.0, 1.0, 2.0, 0.0]
    assert jensen_shannon(*(torch.tensor(row).double() for row in rows)) == pytest.approx(
        by_definition(*rows)
    )


def test_a_planted_language_expert_is_seen() -> None:
    report = DomainDivergence().measure(
        Evidence.of(with_sums([5.0, 5.0, 0.0], [10.0, 10.0, 0.0], [0.0, 0.0, 7.0]))
    )
    assert report.rows[0] == pytest.approx({"layer": 0, "mean": 0.5, "largest": 1.0})


def test_one_domain_has_nothing_to_differ_from() -> None:
    assert DomainDivergence().measure(Evidence.of(with_sums([1.0, 2.0]))).scalars == {
        "mean": None,
        "largest": None,
    }


def test_what_is_no_number_is_not_reported_as_the_same_use() -> None:
    report = DomainDivergence().measure(Evidence.of(with_sums([5.0, 5.0], [math.nan, 1.0])))
    assert report.scalars == {"mean": None, "largest": None}
    assert (
        DomainDivergence().measure(Evidence.of(with_sums([math.nan, 5.0], [1.0, 1.0]))).scalars["mean"]
        is None
    )
