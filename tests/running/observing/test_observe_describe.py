"""What a trace says in numbers, by hand on traces of a few experts, and the page made of it."""

from __future__ import annotations

import math

import pytest
import torch
from report_pages import assert_self_contained

from mixtura.running.observing.describe import describe
from mixtura.running.observing.report import layer_by_domain_rows, layer_rows, observation_page
from mixtura.types import LayerShape
from mixtura.types.trace import LayerTrace, Trace


def trace_of(counts: list[list[int]], tokens: list[int], **fields: object) -> Trace:
    """A trace of one layer; one row of counts per domain."""
    table = torch.tensor(counts)
    layer = LayerTrace(
        index=3,
        shape=LayerShape(8, 4, table.shape[1]),
        top_k=2,
        num_groups=1,
        expert_num_bytes=100,
        counts=table,
        weight_sums=table.double() / 2,
        **fields,
    )
    names = tuple("abcdefgh"[: len(counts)])
    return Trace(source_digest="x", model_type="m", domains=names, num_tokens=tuple(tokens), layers=(layer,))


def test_domains_that_share_no_expert_are_wholly_specialised() -> None:
    described = describe(trace_of([[100, 100, 0, 0], [0, 0, 50, 50]], [100, 50]))
    assert described.specialisation == (pytest.approx(1.0),)
    assert [(found.expert, found.domain) for found in described.specialists] == [
        (0, "a"),
        (1, "a"),
        (2, "b"),
        (3, "b"),
    ]
    assert all(found.share_of_use == 1 and found.share_of_tokens == 1 for found in described.specialists)


def test_domains_that_use_experts_alike_are_not_specialised_whatever_their_sizes() -> None:
    described = describe(trace_of([[300, 100], [30, 10], [3000, 1000]], [200, 20, 2000]))
    assert described.specialisation == (pytest.approx(0.0, abs=1e-12),)
    assert described.specialists == ()


def test_specialisation_is_the_divergence_of_the_domains() -> None:
    described = describe(trace_of([[3, 1], [1, 3]], [2, 2]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert described.specialisation == (pytest.approx((math.log(2) - entropy) / math.log(2)),)


def test_experts_seen_too_seldom_are_no_specialists() -> None:
    assert describe(trace_of([[31, 1000], [0, 1000]], [516, 500])).specialists == ()


def test_one_domain_has_no_specialisation() -> None:
    described = describe(trace_of([[10, 30]], [20]))
    assert described.specialisation == (None,)
    assert described.specialists == ()
    assert layer_rows(described)[1][0][-1] == "–"


def test_load_is_told_for_all_text_and_by_domain() -> None:
    described = describe(trace_of([[10, 0], [10, 20]], [5, 15]))
    assert described.load.rows[0]["max_over_mean"] == pytest.approx(1.0)
    assert described.load_by_domain["a"].rows[0]["dead"] == 1
    assert layer_by_domain_rows(described) == (["layer", "a", "b"], [["3", "0.000 (1)", "0.918 (0)"]])


def test_page_shows_a_map_for_all_text_each_domain_and_each_statistic() -> None:
    values = {"output_norm": torch.tensor([[1.0, 2.0], [0.0, 4.0]], dtype=torch.float64)}
    html = observation_page("<model>", describe(trace_of([[90, 10], [0, 100]], [50, 50], statistics=values)))
    assert_self_contained(html)
    assert html.count("<figure>") == 4
    assert "What the experts of &lt;model&gt; do" in html
    assert "layer 3, expert 0: 1.80×" in html
    assert "never chosen" in html


def test_page_warns_of_short_text() -> None:
    assert "This text is short" in observation_page("m", describe(trace_of([[3, 1]], [2])))
    assert "This text is short" not in observation_page("m", describe(trace_of([[300, 100]], [200])))


def test_page_of_layers_of_different_widths() -> None:
    first = trace_of([[300, 100]], [200])
    second = trace_of([[100, 200, 100]], [200])
    both = Trace(
        source_digest="x",
        model_type="m",
        domains=("a",),
        num_tokens=(200,),
        layers=first.layers + second.layers,
    )
    assert_self_contained(observation_page("m", describe(both)))
