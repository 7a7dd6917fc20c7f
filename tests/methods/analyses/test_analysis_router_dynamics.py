"""What the analysis router_dynamics promises beyond its kind's contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from analysed import trace_of

from mixtura.errors import UserError
from mixtura.methods.analyses import Evidence
from mixtura.methods.analyses.router_dynamics import RouterDynamics


def drawn(*shape: int, seed: int = 0, high: int = 8) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def chosen(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(top_k).indices


class TestRouterDynamics:
    def test_the_last_is_saturated_and_what_stays_does_not_change(self) -> None:
        first, last = chosen(200, 8, 2, seed=1), chosen(200, 8, 2, seed=2)
        traces = tuple(trace_of(one, num_experts=8) for one in (first, last, last))
        report = RouterDynamics().measure(Evidence(traces=traces, steps=(1, 2, 3)))
        same = sum(len(set(a) & set(b)) for a, b in zip(first.tolist(), last.tolist(), strict=True)) / 400
        assert report.rows[0] == pytest.approx(
            {"layer": 0, "saturation": same, "change": 0, "utilisation": 1}
        )
        assert [row[1] for row in report.tables[0].rows] == pytest.approx([same, 1, 1])
        assert [row[2] for row in report.tables[0].rows[1:]] == pytest.approx([1 - same, 0])

    def test_a_dead_expert_is_not_used(self) -> None:
        made = chosen(200, 7, 2)
        traces = tuple(trace_of(made, num_experts=8) for _ in range(2))
        assert RouterDynamics().measure(Evidence(traces=traces)).scalars["utilisation"] == 7 / 8

    def test_other_text_other_models_and_falling_steps_are_refused(self) -> None:
        one = trace_of(chosen(20, 8, 2), num_experts=8, token_ids=drawn(20))
        with pytest.raises(UserError, match="observe each with --save"):
            RouterDynamics().measure(Evidence.of(one))
        with pytest.raises(UserError, match="different text"):
            RouterDynamics().measure(Evidence.of(replace(one, token_ids=drawn(20, seed=9)), one))
        with pytest.raises(UserError, match="different layers"):
            RouterDynamics().measure(Evidence.of(trace_of(chosen(20, 9, 2), num_experts=9), one))
        with pytest.raises(UserError, match="rising"):
            RouterDynamics().measure(Evidence(traces=(one, one), steps=(5, 2)))
