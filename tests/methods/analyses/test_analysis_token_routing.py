"""What the analysis token_routing promises beyond its kind's contract."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from analysed import trace_of

from mixtura.methods.analyses import Evidence
from mixtura.methods.analyses.token_routing import TokenRouting


def drawn(*shape: int, seed: int = 0, high: int = 8) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def chosen(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(top_k).indices


class TestTokenRouting:
    def test_a_table_of_ids_is_explained_wholly(self) -> None:
        ids = drawn(600, high=40)
        report = TokenRouting().measure(
            Evidence.of(trace_of((ids % 8)[:, None], num_experts=8, token_ids=ids))
        )
        assert report.scalars["explained"] == pytest.approx(1)
        assert report.scalars["beyond_chance"] == pytest.approx(1)
        assert report.scalars["top_share"] == 1

    def test_choices_by_lot_are_explained_by_chance_alone(self) -> None:
        ids, made = drawn(4000, high=20), drawn(4000, 1, seed=1)
        report = TokenRouting().measure(Evidence.of(trace_of(made, num_experts=8, token_ids=ids)))
        assert report.scalars["explained"] == pytest.approx(report.scalars["by_chance"], abs=0.005)

    def test_mutual_information_is_that_of_plain_counting(self) -> None:
        ids, made = drawn(300, high=6, seed=2), chosen(300, 5, 2, seed=3)
        pairs = Counter((int(t), int(e)) for t, row in zip(ids, made, strict=True) for e in row)
        rows, columns = Counter[int](), Counter[int]()
        for (token, expert), count in pairs.items():
            rows[token] += count
            columns[expert] += count
        total = sum(pairs.values())
        information = sum(
            n / total * math.log(n * total / (rows[t] * columns[e])) for (t, e), n in pairs.items()
        )
        entropy = -sum(n / total * math.log(n / total) for n in columns.values())
        found = TokenRouting().measure(Evidence.of(trace_of(made, num_experts=5, token_ids=ids)))
        assert found.rows[0]["explained"] == pytest.approx(information / entropy)

    def test_what_is_learnt_early_is_seen(self) -> None:
        ids = drawn(600, high=10)
        last = (ids % 8)[:, None]
        half = torch.where(ids[:, None] < 5, last, (last + 1) % 8)
        traces = tuple(trace_of(made, num_experts=8, token_ids=ids) for made in (half, last))
        assert TokenRouting().measure(Evidence(traces=traces)).scalars["settled"] == pytest.approx(0.5)
