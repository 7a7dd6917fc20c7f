"""What the analysis standing_committee promises beyond its kind's contract."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from analysed import trace_of

from mixtura.methods.analyses import Evidence
from mixtura.methods.analyses.standing_committee import StandingCommittee


def drawn(*shape: int, seed: int = 0, high: int = 8) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def chosen(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(top_k).indices


class TestStandingCommittee:
    def test_the_planted_committee_is_found(self) -> None:
        """Experts 2 and 5 serve every domain; each domain has specialists of its own besides."""
        domains = torch.arange(4).repeat_interleave(60)
        own = torch.tensor([0, 1, 3, 4])[domains]
        leading = torch.tensor([2, 5, 2, 5])[domains]
        choices = torch.stack([leading, torch.where(torch.arange(240) % 3 == 0, own, 7 - leading)], 1)
        names = ("a", "b", "c", "d")
        trace = trace_of(choices, num_experts=8, lengths=(60,) * 4, domains=(0, 1, 2, 3), names=names)
        assert StandingCommittee().find(trace) == {0: (2, 5)}
        row = StandingCommittee().measure(Evidence.of(trace)).rows[0]
        assert row["coverage"] == pytest.approx(1 - 80 / 480)
        assert row["advantage"] == pytest.approx((400 / 480 / 2) / (80 / 480 / 6))

    def test_it_is_the_authors_rule(self) -> None:
        """Against a plain reading of it: ranks, the absent one more, presence, nobody better in both."""
        made = chosen(400, 8, 3, seed=4)
        trace = trace_of(made, num_experts=8, lengths=(100,) * 4, domains=(0, 1, 2, 3), names=tuple("abcd"))
        weights = trace.layers[0].weight_sums.tolist()
        ranks: dict[int, list[int]] = {}
        for row in weights:
            order = sorted(range(8), key=lambda expert: -row[expert])[:3]
            for expert in range(8):
                ranks.setdefault(expert, []).append(order.index(expert) + 1 if expert in order else 4)
        able = [e for e, r in ranks.items() if sum(x < 4 for x in r) >= math.ceil(0.8 * 4)]
        if not able:
            most = max(sum(x < 4 for x in r) for r in ranks.values())
            able = [e for e, r in ranks.items() if sum(x < 4 for x in r) == most]
        points = {e: (np.mean(ranks[e]), np.var(ranks[e])) for e in able}
        best = [
            e
            for e in able
            if not any(
                points[o][0] <= points[e][0] and points[o][1] <= points[e][1] and points[o] != points[e]
                for o in able
            )
        ]
        assert StandingCommittee().find(trace)[0] == tuple(best)
