"""What the merger hc_smoe promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage

from mixtura.authoring.contracts import sample_trace
from mixtura.errors import SettingError
from mixtura.methods import create
from mixtura.methods.mergers.hc_smoe import HcSmoe
from mixtura.types import Budget
from mixtura.types.trace import Trace


def trace_of(outputs: torch.Tensor) -> Trace:
    trace = sample_trace(num_layers=1, num_experts=len(outputs))
    return replace(trace, layers=(replace(trace.layers[0], features={"mean_output": outputs.double()}),))


@pytest.mark.parametrize("how", ["average", "complete", "single"])
@pytest.mark.parametrize("num_groups", [1, 3, 7])
def test_clusters_are_those_that_scipy_finds(how: str, num_groups: int) -> None:
    outputs = torch.randn(16, 5, generator=torch.Generator().manual_seed(num_groups))
    plan = HcSmoe(linkage=how).plan(trace_of(outputs), Budget(num_experts=num_groups))
    labels = fcluster(linkage(outputs.double().numpy(), how), num_groups, "maxclust")
    expected = {frozenset(e for e in range(16) if labels[e] == label) for label in set(labels)}
    found = {frozenset(one.experts) for one in plan.merged()[0]}
    assert found == {group for group in expected if len(group) > 1}
    assert not any(one.aligned for one in plan.merged()[0])


def test_experts_with_one_output_find_each_other() -> None:
    outputs = torch.tensor([[0.0, 0], [5, 5], [0.1, 0], [9, 0], [5, 5.1], [9, 9]])
    plan = HcSmoe().plan(trace_of(outputs), Budget(num_experts=4))
    assert {frozenset(one.experts) for one in plan.merged()[0]} == {frozenset({0, 2}), frozenset({1, 4})}


def test_other_linkages_are_refused() -> None:
    with pytest.raises(SettingError, match="linkage of HcSmoe must be"):
        create("mergers", "hc_smoe", linkage="ward")
