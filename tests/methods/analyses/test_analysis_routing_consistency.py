"""What the analysis routing_consistency promises beyond its kind's contract: definitions, in loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mixtura.authoring.contracts import sample_trace
from mixtura.errors import UserError
from mixtura.methods.analyses import Evidence
from mixtura.methods.analyses._caching import segment_hits
from mixtura.methods.analyses.routing_consistency import RoutingConsistency
from mixtura.types.trace import Trace


def traced(*layers: Tensor, lengths: tuple[int, ...], num_experts: int) -> Trace:
    made = sample_trace(seed=0, num_experts=num_experts, num_layers=len(layers))
    changed = tuple(
        replace(one, choices=choices, top_k=choices.shape[1])
        for one, choices in zip(made.layers, layers, strict=True)
    )
    return replace(made, layers=changed, sequence_lengths=lengths)


def drawn(num_tokens: int, num_experts: int, top_k: int, seed: int) -> Tensor:
    """Choices of experts of which some are much likelier, slowly changing."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for token in range(num_tokens):
        scores = torch.randn(num_experts, generator=generator)
        scores[(token // 7) % num_experts] += 2
        rows.append(scores.topk(top_k).indices)
    return torch.stack(rows)


def srp_by_definition(sequences: list[list[list[int]]], num_experts: int, segment: int) -> float:
    best = 0.0
    for least in range(segment + 1):
        met = said = there = 0
        for tokens in sequences:
            for start in range(len(tokens) - segment + 1):
                window = tokens[start : start + segment]
                for expert in range(num_experts):
                    times = sum(expert in token for token in window)
                    there += times
                    if times >= least:
                        met, said = met + times, said + segment
        best = max(best, 2 * met / (said + there))
    return best


def hits_by_definition(tokens: list[list[int]], size: int, ahead: int) -> int:
    """The cache, with what is needed counted anew from the text at every step."""
    inside: list[int] = []
    last: dict[int, int] = {}
    hits = clock = 0
    for place, token in enumerate(tokens):
        begun, fresh = list(inside), len(last)
        for expert in token:
            if expert in last:
                hits += expert in begun
            else:
                hits += fresh < size
                fresh += 1
        for done, expert in enumerate(token):
            rest = [*token[done:], *(e for later in tokens[place + 1 : place + ahead] for e in later)]
            if expert not in inside:
                if len(inside) == size:
                    inside.remove(min(inside, key=lambda one: (rest.count(one), last[one])))
                inside.append(expert)
            clock += 1
            last[expert] = clock
    return hits


@pytest.mark.parametrize("segment", [1, 4, 16])
def test_srp_is_as_defined(segment: int) -> None:
    first, second = drawn(30, 6, 2, seed=1), drawn(25, 6, 2, seed=2)
    trace = traced(torch.cat([first, second]), lengths=(30, 25), num_experts=6)
    found = RoutingConsistency(segment=segment).measure(Evidence.of(trace)).rows[0]["srp"]
    assert found == pytest.approx(srp_by_definition([first.tolist(), second.tolist()], 6, segment))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("ahead", [1, 4, 50])
def test_hits_are_as_defined(size: int, ahead: int) -> None:
    for seed in range(3):
        tokens = drawn(60, 8, 2, seed=seed).tolist()
        assert segment_hits(tokens, size, ahead) == hits_by_definition(tokens, size, ahead)


def test_a_larger_cache_has_no_fewer_hits_and_room_for_all_misses_nothing() -> None:
    tokens = drawn(80, 8, 2, seed=3).tolist()
    hits = [segment_hits(tokens, size, 6) for size in range(1, 9)]
    assert hits == sorted(hits)
    assert hits[-1] == 160


def test_the_sch_of_a_trace_is_the_mean_over_sequences() -> None:
    first, second = drawn(40, 6, 2, seed=1), drawn(20, 6, 2, seed=2)
    trace = traced(torch.cat([first, second]), lengths=(40, 20), num_experts=6)
    found = RoutingConsistency(segment=4, cache=1.0).measure(Evidence.of(trace)).rows[0]["sch"]
    rates = [hits_by_definition(one.tolist(), 2, 4) / one.numel() for one in (first, second)]
    assert found == pytest.approx(sum(rates) / 2)


def test_planted_structure_is_found() -> None:
    """Experts that change from segment to segment are consistent; that change at every token, not."""
    steady = torch.arange(64)[:, None] // 16 % 4 * 2 + torch.tensor([0, 1])
    restless = torch.arange(64)[:, None] % 4 * 2 + torch.tensor([0, 1])
    report = RoutingConsistency(segment=16, cache=1.0).measure(
        Evidence.of(traced(steady, restless, lengths=(16,) * 4, num_experts=8))
    )
    assert report.rows[0]["srp"] == 1.0
    assert report.rows[0]["sch"] == 1.0
    assert report.rows[1]["srp"] == pytest.approx(0.4)
    assert report.rows[1]["sch"] is not None
    assert report.rows[1]["sch"] < 0.3


def test_windows_do_not_cross_sequences() -> None:
    choices = torch.tensor([[0], [0], [1], [1]])
    apart = RoutingConsistency(segment=2).measure(Evidence.of(traced(choices, lengths=(2, 2), num_experts=4)))
    together = RoutingConsistency(segment=2).measure(
        Evidence.of(traced(choices, lengths=(4,), num_experts=4))
    )
    assert apart.scalars["srp"] == 1.0
    assert together.scalars["srp"] is not None
    assert together.scalars["srp"] < 1.0


def test_a_trace_without_choices_is_refused() -> None:
    made = sample_trace(seed=0)
    with pytest.raises(UserError, match="observe again with keep_choices=True"):
        RoutingConsistency().measure(Evidence.of(replace(made, sequence_lengths=())))
