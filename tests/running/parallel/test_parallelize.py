"""Experts on two and four processes give what one process gives: outputs, every gradient, their norm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parallel_process import Case, alone, loss_of, model_of, run
from safetensors.torch import load_file
from torch import Tensor

from mixtura.authoring.contracts import sample_cluster
from mixtura.authoring.contracts._processes import run_apart
from mixtura.methods import create
from mixtura.running.parallel.planning import trace_of_sizes
from mixtura.running.parallel.traffic import traffic_of

SPREAD = {
    2: {
        "contiguous": Case(),
        "copies": Case(placement="copies"),
        "all on one": Case(placement="all on one"),
        "hecate": Case(placement="hecate", settings={"spare": 1}),
        "tokens move": Case(placement="adaptive", settings={"row_num_bytes": 1}),
        "experts move": Case(placement="adaptive", settings={"row_num_bytes": 1 << 24}),
        "own": Case(model="own", placement="copies"),
        "biases": Case(model="gpt_oss", placement="random"),
        "parts": Case(placement="expert_slicing", settings={"parts": 2}),
        "checkpointing": Case(placement="copies", checkpointing=True),
        "copies again": Case(placement="copies"),
        "half": Case(placement="copies", dtype=torch.bfloat16),
    },
    4: {
        "random": Case(placement="random"),
        "spilled": Case(placement="least_loaded", settings={"least_rows": 1, "most": 1.0}),
        "hierarchical": Case(placement="copies", exchange="hierarchical", nodes=2),
        "two dimensional": Case(placement="random", exchange="two_dimensional", nodes=2),
        "groups": Case(placement="expert_data_parallel", nodes=2),
        "all on one": Case(placement="all on one", exchange="hierarchical", nodes=2),
        "own": Case(model="own", placement="round_robin", checkpointing=True),
    },
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Where the processes wrote what they found; all cases of a number of processes in one start of them."""
    found = {}
    for size, cases in SPREAD.items():
        found[size] = tmp_path_factory.mktemp(f"processes{size}")
        run_apart(run, size, size, str(found[size]), cases)
    return found


_ALONE: dict[tuple[str, int], dict[str, Tensor]] = {}


def reference(case: Case, size: int) -> dict[str, Tensor]:
    """What one process finds, once for all placements of a model."""
    key = (case.model, size)
    if key not in _ALONE:
        _ALONE[key] = alone(case, size)
    return _ALONE[key]


EXACT = [
    (size, name)
    for size, cases in SPREAD.items()
    for name, case in cases.items()
    if case.dtype == torch.float64 and not name.endswith(" again")
]


@pytest.mark.parametrize(("size", "name"), EXACT)
def test_processes_are_as_one(ran: dict[int, Path], size: int, name: str) -> None:
    wanted = reference(SPREAD[size][name], size)
    found = [load_file(ran[size] / f"{name}.{rank}") for rank in range(size)]
    for rank in range(size):
        torch.testing.assert_close(found[rank]["logits"], wanted[f"logits {rank}"], rtol=1e-9, atol=1e-11)
    grads = {key: value for key, value in wanted.items() if key.startswith("grad ")}
    assert grads.keys() == {key for key in found[0] if key.startswith("grad ")}
    for key, value in grads.items():
        torch.testing.assert_close(
            found[0][key], value, rtol=1e-8, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}"
        )
    norm = torch.stack([value.double().square().sum() for value in grads.values()]).sum().sqrt()
    for one in found:
        torch.testing.assert_close(one["norm"][0], norm, rtol=1e-9, atol=0.0)


def test_the_same_again_gives_the_same_bits(ran: dict[int, Path]) -> None:
    for rank in range(2):
        once, again = (load_file(ran[2] / f"{name}.{rank}") for name in ("copies", "copies again"))
        assert once.keys() == again.keys()
        assert all(torch.equal(value, again[key]) for key, value in once.items())


def test_half_precision_is_close(ran: dict[int, Path]) -> None:
    case = SPREAD[2]["half"]
    with torch.no_grad():
        model = model_of(case)
        for rank in range(2):
            found = load_file(ran[2] / f"half.{rank}")
            assert found["logits"].dtype == torch.bfloat16
            torch.testing.assert_close(found["logits"], loss_of(model, rank)[1], rtol=0.05, atol=0.05)
            assert torch.isfinite(found["norm"]).all()


def test_hops_send_fewer_messages_between_nodes(ran: dict[int, Path]) -> None:
    flat, hops = (load_file(ran[4] / f"{name}.0")["sent"].tolist() for name in ("random", "two dimensional"))
    assert flat[1] == 0, "one node has nothing between nodes"
    assert hops[1] > 0
    assert hops[2] < flat[2]


def test_bytes_are_those_that_are_predicted(ran: dict[int, Path]) -> None:
    case = SPREAD[2]["tokens move"]
    found = [load_file(ran[2] / f"tokens move.{rank}") for rank in range(2)]
    d_model = model_of(case).config.hidden_size
    predicted = 0.0
    for loads in found[0]["loads"]:
        at = create("placements", "contiguous").plan(
            trace_of_sizes([(0, d_model, 8, loads.shape[1], 2)]), sample_cluster(1, 2)
        )
        way = traffic_of(at.layers[0], loads, sample_cluster(1, 2))
        # There and back, in the forward pass and in the backward pass, numbers of 8 bytes.
        predicted += 4 * float(way.sent.sum()) * d_model * 8
    assert sum(int(one["sent"][0]) for one in found) == predicted > 0


def test_experts_that_move_leave_tokens_where_they_are(ran: dict[int, Path]) -> None:
    moved = [load_file(ran[2] / f"experts move.{rank}")["sent"].tolist()[0] for rank in range(2)]
    experts = [p for n, p in model_of(Case()).named_parameters() if ".experts." in n]
    assert sum(moved) == 2 * sum(p.numel() * p.element_size() for p in experts)
