"""What the analysis late_drops promises beyond its kind's contract."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from analysed import trace_of

from mixtura.methods.analyses import Evidence
from mixtura.methods.analyses.late_drops import LateDrops


def drawn(*shape: int, seed: int = 0, high: int = 8) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def chosen(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(top_k).indices


class TestLateDrops:
    def test_against_a_queue(self) -> None:
        made = chosen(50, 4, 2, seed=5)
        report = LateDrops(factor=0.9, parts=5).measure(
            Evidence.of(trace_of(made, num_experts=4, lengths=(20, 30)))
        )
        dropped, taken = [0] * 5, [0] * 5
        for start, length in ((0, 20), (20, 30)):
            room, load = math.ceil(0.9 * length * 2 / 4), Counter[int]()
            for place in range(length):
                for expert in made[start + place].tolist():
                    taken[place * 5 // length] += 1
                    dropped[place * 5 // length] += load[expert] >= room
                    load[expert] += 1
        assert report.scalars["dropped"] == pytest.approx(sum(dropped) / sum(taken))
        assert report.scalars["last"] == pytest.approx(dropped[-1] / taken[-1])
        assert report.scalars["first"] == 0

    def test_room_for_all_drops_nothing(self) -> None:
        made = torch.zeros(40, 1, dtype=torch.int64)
        trace = trace_of(made, num_experts=4)
        assert LateDrops(factor=4.0).measure(Evidence.of(trace)).scalars["dropped"] == 0
        assert LateDrops(factor=1.0).measure(Evidence.of(trace)).scalars["dropped"] == 0.75
