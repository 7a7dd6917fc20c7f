"""Predicted costs: by hand where that is short, and what must hold for any."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mixtura.authoring.contracts import sample_cluster, sample_trace
from mixtura.errors import UserError
from mixtura.methods.placements.contiguous import Contiguous
from mixtura.methods.placements.hecate import Hecate
from mixtura.running.parallel.planning import compare, trace_of_sizes
from mixtura.running.parallel.pricing import Price, Work, price
from mixtura.types.placement import Cluster, Link

# Two layers of four experts, of which a token chooses two: D 10, F 20.
TRACE = trace_of_sizes([(0, 10, 20, 4, 2), (1, 10, 20, 4, 2)])
WORK = Work(tokens_per_device=100, training=False, other_num_parameters=1000)


def priced(cluster: Cluster, work: Work = WORK) -> Price:
    return price(Contiguous().plan(TRACE, cluster), TRACE, cluster, work)


def test_a_pass_by_hand() -> None:
    found = priced(sample_cluster(2, 2))
    # Each device sends 50 rows of 20 bytes to each other and computes 200, in each of two layers.
    assert found.expert_s == pytest.approx(2 * 200 * 6 * 10 * 20 / 1e12)
    one_way = 1000 / 1e10 + 2000 / 1e9 + 1e-5 + 2 * 5e-5
    assert found.exchange_s == pytest.approx(2 * 2 * one_way)
    assert found.within_num_bytes == pytest.approx(2 * 2 * 4 * 1000)
    assert found.between_num_bytes == pytest.approx(2 * 2 * 4 * 2000)
    assert found.num_messages == 2 * 2 * 3
    assert found.other_s == pytest.approx(2 * 1000 * 100 / 1e12)
    assert found.step_s == pytest.approx(found.expert_s + found.exchange_s + found.other_s)
    assert found.idle_share == pytest.approx(1 - (found.expert_s + found.other_s) / found.step_s)
    # An expert of 600 numbers a device and layer, 200 rows with what is made of them; the rest of the model.
    assert found.memory_num_bytes == pytest.approx(2 * (600 * 2 + 200 * (20 + 60) * 2) + 1000 * 2)
    assert found.busiest == pytest.approx(1.0)


def test_a_step_of_training_exchanges_four_times_and_computes_three() -> None:
    once, step = priced(sample_cluster()), priced(sample_cluster(), replace(WORK, training=True))
    assert step.exchange_s == pytest.approx(2 * once.exchange_s)
    assert step.expert_s == pytest.approx(3 * once.expert_s)
    ring = 6 * (1000 * 2 / 4 / 1e9 + 5e-5)
    assert step.other_s == pytest.approx(3 * once.other_s + ring)


def test_hops_send_fewer_messages() -> None:
    cluster = sample_cluster(4, 4)
    made = Contiguous().plan(TRACE, cluster)
    flat = price(made, TRACE, cluster, WORK)
    hops = price(made, TRACE, cluster, WORK, hops=("between", "within"))
    assert (flat.num_messages, hops.num_messages) == (2 * 2 * 15, 2 * 2 * 6)
    assert hops.between_num_bytes == pytest.approx(flat.between_num_bytes)


def test_one_device_exchanges_nothing() -> None:
    found = priced(sample_cluster(1, 1))
    assert (found.exchange_s, found.within_num_bytes, found.num_messages) == (0.0, 0.0, 0)
    assert found.idle_share == pytest.approx(0.0)


def test_copies_are_paid_for() -> None:
    trace, cluster = sample_trace(1), sample_cluster()
    placer = Hecate(spare=2)
    work = Work(tokens_per_device=10)
    with_copies = price(placer.plan(trace, cluster), trace, cluster, work, placer=placer)
    without = price(placer.plan(trace, cluster), trace, cluster, work)
    assert without.copy_s == 0 < with_copies.copy_s
    assert with_copies.memory_num_bytes > without.memory_num_bytes
    assert with_copies.exchange_s < without.exchange_s


def test_too_little_memory_is_last() -> None:
    cluster = replace(sample_cluster(), memory_num_bytes=1000)
    assert not priced(cluster).fits
    options = compare(["flexsp", "contiguous"], TRACE, cluster, WORK)
    assert [one.name for one in options] == ["contiguous", "flexsp"]
    assert options[1].price is None
    assert "does not say how long its sequences are" in options[1].reason


def test_a_placement_for_another_cluster_is_refused() -> None:
    made = Contiguous().plan(TRACE, sample_cluster(2, 2))
    with pytest.raises(UserError, match="for 4 devices, in nodes of 2; the cluster has 4 in nodes of 4"):
        price(made, TRACE, sample_cluster(1, 4), WORK)


def test_thousands_of_devices_are_no_matter() -> None:
    link = Link(latency_s=1e-6, bytes_per_s=1e10)
    cluster = Cluster(
        num_nodes=256, devices_per_node=8, flops_per_s=1e14, memory_num_bytes=1 << 36, within=link,
        between=link,
    )  # fmt: skip
    trace = trace_of_sizes([(0, 7168, 2048, 256, 8)])
    found = price(Contiguous().plan(trace, cluster), trace, cluster, Work())
    assert found.busiest == pytest.approx(8.0)
