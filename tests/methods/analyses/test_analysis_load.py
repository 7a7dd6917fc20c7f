"""What the analysis load promises beyond its kind's contract."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mixtura.authoring.contracts import sample_trace
from mixtura.methods.analyses import Evidence, Report
from mixtura.methods.analyses.load import Load


def measured(*loads: list[int], dead_share: float = 0.0) -> Report:
    """The report on layers whose experts have these loads, split over two domains."""
    trace = sample_trace(num_layers=len(loads), num_experts=len(loads[0]))
    layers = tuple(
        replace(layer, counts=torch.tensor([load, [0] * len(load)]))
        for layer, load in zip(trace.layers, loads, strict=True)
    )
    return Load(dead_share=dead_share).measure(Evidence.of(replace(trace, layers=layers)))


def test_by_hand() -> None:
    report = measured([5, 5, 5, 5], [8, 4, 4, 0], [20, 0, 0, 0])
    even, skewed, collapsed = report.rows
    assert even == {"layer": 0, "max_over_mean": 1.0, "entropy": pytest.approx(1.0), "dead": 0}
    expected = (0.5 * math.log(2) + 2 * 0.25 * math.log(4)) / math.log(4)
    assert skewed == {"layer": 1, "max_over_mean": 2.0, "entropy": pytest.approx(expected), "dead": 1}
    assert collapsed == {"layer": 2, "max_over_mean": 4.0, "entropy": pytest.approx(0.0), "dead": 3}
    assert report.scalars["max_over_mean"] == 4.0
    assert report.scalars["entropy"] == pytest.approx((1 + expected) / 3)
    assert report.scalars["dead"] == 4


def test_dead_share_counts_the_nearly_dead() -> None:
    assert measured([50, 45, 4, 1], dead_share=0.1).rows[0]["dead"] == 1
    assert measured([50, 45, 4, 1], dead_share=0.2).rows[0]["dead"] == 2


def test_a_layer_that_saw_nothing_has_no_balance() -> None:
    report = measured([0, 0, 0, 0], [1, 1, 1, 1])
    assert report.rows[0] == {"layer": 0, "max_over_mean": None, "entropy": None, "dead": 4}
    assert report.scalars["entropy"] == pytest.approx(1.0)
