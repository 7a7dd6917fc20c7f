"""Traces: what is derived from them, and that they save and load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixtura.authoring.contracts import relabelled, sample_trace
from mixtura.authoring.contracts._compare import same
from mixtura.errors import UnknownNameError, UserError
from mixtura.types.trace import Trace


def test_saves_and_loads(tmp_path: Path) -> None:
    trace = sample_trace(num_experts=16, num_groups=4, top_groups=2)
    path = tmp_path / "trace.safetensors"
    trace.save(path)
    assert same(Trace.load(path), trace)


def test_saves_and_loads_without_the_optional_parts(tmp_path: Path) -> None:
    layers = tuple(
        replace(layer, statistics={}, coactivation=None, transitions=None, choices=None)
        for layer in sample_trace(num_layers=12).layers
    )
    trace = replace(sample_trace(), layers=layers)
    trace.save(tmp_path / "trace.safetensors")
    assert same(Trace.load(tmp_path / "trace.safetensors"), trace)


def test_means_are_pooled_by_count_and_maxima_taken() -> None:
    layer = replace(
        sample_trace(num_experts=3).layers[0],
        counts=torch.tensor([[1, 0, 0], [3, 2, 0]]),
        statistics={
            "output_norm": torch.tensor([[8.0, 0.0, 0.0], [4.0, 5.0, 0.0]]),
            "max_output": torch.tensor([[8.0, 0.0, 0.0], [4.0, 5.0, 0.0]]),
        },
    )
    assert layer.statistic("output_norm").tolist() == [5.0, 5.0, 0.0]
    assert layer.statistic("max_output").tolist() == [8.0, 5.0, 0.0]
    assert layer.load.tolist() == [4, 2, 0]


def test_a_statistic_that_was_not_recorded() -> None:
    with pytest.raises(UserError, match="no statistic 'output_nrm'; did you mean 'output_norm'"):
        sample_trace().layers[0].statistic("output_nrm")


def test_layers_by_index() -> None:
    trace = sample_trace(num_layers=2)
    assert trace.layer(1) is trace.layers[1]
    with pytest.raises(UserError, match=r"layer 7 has no experts; the MoE layers are \[0, 1\]"):
        trace.layer(7)


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="not a trace that can be read"):
        Trace.load(path)
    path.write_bytes(b"rubbish")
    with pytest.raises(UserError, match="not a trace that can be read"):
        Trace.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a trace of version 1"):
        Trace.load(path)


def test_a_directory_is_told_from_a_trace(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"is a directory, and a trace is a file; .*mixtura observe .* --save FILE"
    ):
        Trace.load(tmp_path)


def test_the_made_up_trace_is_of_one_text() -> None:
    trace = sample_trace(num_layers=3, num_experts=8, top_k=2, num_tokens=100)
    for layer in trace.layers:
        assert int(layer.load.sum()) == 200
        assert layer.choices is not None
        assert torch.equal(layer.choices.flatten().bincount(minlength=8), layer.load)
        assert layer.coactivation is not None
        assert torch.equal(layer.coactivation.sum(1), layer.load)
        if layer.transitions is not None:
            assert torch.equal(layer.transitions.sum(1), 2 * layer.load)
    assert trace.layers[-1].transitions is None


def test_relabelling_back_is_the_same_trace() -> None:
    trace = sample_trace(num_layers=3)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(8, generator=generator) for _ in trace.layers]
    moved = relabelled(trace, orders)
    assert not same(moved, trace)
    assert same(relabelled(moved, [order.argsort() for order in orders]), trace)


def test_the_part_of_a_domain_keeps_only_its_own() -> None:
    whole = sample_trace(num_layers=1, num_experts=2, top_k=1)
    layer = replace(whole.layers[0], counts=torch.tensor([[10, 0], [1, 2]]))
    part = replace(whole, num_tokens=(10, 3), layers=(layer,)).of("code")
    assert (part.domains, part.num_tokens) == (("code",), (3,))
    (only,) = part.layers
    assert only.counts.tolist() == [[1, 2]]
    assert torch.equal(only.weight_sums, layer.weight_sums[1:])
    assert all(torch.equal(only.statistics[name], layer.statistics[name][1:]) for name in layer.statistics)
    assert (only.coactivation, only.transitions, only.choices) == (None, None, None)
    with pytest.raises(UnknownNameError, match="did you mean 'code'"):
        whole.of("coed")


def test_totals_are_means_times_counts() -> None:
    layer = replace(
        sample_trace(num_layers=1, num_experts=2, top_k=1).layers[0],
        counts=torch.tensor([[4, 0], [1, 2]]),
        statistics={"output_norm": torch.tensor([[2.0, 0.0], [3.0, 0.5]])},
    )
    assert layer.total("output_norm").tolist() == [[8.0, 0.0], [3.0, 1.0]]
    with pytest.raises(UserError, match="no statistic 'output_nrm'"):
        layer.total("output_nrm")
