"""What the merger m_smoe promises beyond its kind's contract."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mixtura.authoring.contracts import sample_trace
from mixtura.errors import UserError
from mixtura.methods.mergers import Merger
from mixtura.methods.mergers.hc_smoe import HcSmoe
from mixtura.methods.mergers.m_smoe import MSmoe
from mixtura.types import Budget, Merge
from mixtura.types.trace import Trace


def trace_of(load: list[int], logits: torch.Tensor) -> Trace:
    """One layer of experts chosen so often, with these logits of tokens."""
    trace = sample_trace(num_layers=1, num_experts=len(load), top_k=1)
    counts = torch.tensor([load, [0] * len(load)])
    features = {"logit_products": logits.double().T @ logits.double()}
    return replace(trace, layers=(replace(trace.layers[0], counts=counts, features=features),))


def test_equals_the_papers_procedure_in_plain_loops() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(40, 8, generator=generator)
    load = [5, 40, 7, 30, 1, 9, 22, 3]
    plan = MSmoe().plan(trace_of(load, logits), Budget(num_experts=3))
    dominant = sorted(range(8), key=lambda e: -load[e])[:3]
    groups = {e: [e] for e in dominant}

    def cosine(one: int, other: int) -> float:
        dot = sum(float(row[one]) * float(row[other]) for row in logits)
        return dot / math.sqrt(
            sum(float(r[one]) ** 2 for r in logits) * sum(float(r[other]) ** 2 for r in logits)
        )

    for expert in (e for e in range(8) if e not in dominant):
        groups[max(dominant, key=lambda d: cosine(expert, d))].append(expert)
    expected = {frozenset(group): group[0] for group in groups.values() if len(group) > 1}
    assert {frozenset(one.experts): one.experts[0] for one in plan.merged()[0]} == expected
    for one in plan.merged()[0]:
        total = sum(load[e] for e in one.experts)
        assert one.shares == pytest.approx([load[e] / total for e in one.experts])
        assert one.aligned


def test_alignment_can_be_left_out() -> None:
    trace = sample_trace(num_layers=1)
    plan = MSmoe(align=False).plan(trace, Budget(num_experts=4))
    assert not any(action.aligned for action in plan.actions if isinstance(action, Merge))


def test_a_trace_without_the_feature_says_how_to_get_it() -> None:
    trace = sample_trace()
    bare = replace(trace, layers=tuple(replace(layer, features={}) for layer in trace.layers))
    with pytest.raises(UserError, match=r"no feature 'logit_products'.*observe again"):
        MSmoe().plan(bare, Budget(num_experts=4))
    with pytest.raises(UserError, match="no feature 'logit_products'"):
        MSmoe().plan(trace.of("code"), Budget(num_experts=4))


@pytest.mark.parametrize("merger", [MSmoe(), HcSmoe()])
def test_features_that_are_no_numbers_are_refused(merger: Merger) -> None:
    trace = sample_trace(num_layers=1)
    layer = trace.layers[0]
    broken = {name: feature.clone() for name, feature in layer.features.items()}
    for feature in broken.values():
        feature[1, 0] = math.nan
    with pytest.raises(UserError, match="of an expert of layer 0 is not finite"):
        merger.plan(replace(trace, layers=(replace(layer, features=broken),)), Budget(num_experts=3))
