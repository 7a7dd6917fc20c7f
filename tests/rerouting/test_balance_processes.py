"""Balancing is the same on one process and on several."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import rerouting_process
from rerouted import assert_alike, gradients, model_of
from safetensors.torch import load_file
from torch.multiprocessing.spawn import spawn

import mixtura


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_two_processes_with_micro_batches_train_as_one_on_the_batch(family: str, tmp_path: Path) -> None:
    spawn(rerouting_process.train, (family, str(tmp_path)), nprocs=rerouting_process.NUM_PROCESSES)
    model, made = rerouting_process.balanced(family)
    model(**rerouting_process.batch(slice(0, rerouting_process.ROWS))).loss.backward()
    made.end_step()
    expected = gradients(model) | {f"bias.{index}": bias for index, bias in made.biases().items()}
    for rank in range(rerouting_process.NUM_PROCESSES):
        assert_alike(expected, load_file(tmp_path / str(rank)), tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_a_trainer_in_two_processes_ends_with_the_weights_of_one(tmp_path: Path, adapters: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(
        rerouting_process.run_trainer, (port, str(tmp_path), adapters), nprocs=rerouting_process.NUM_PROCESSES
    )
    expected = rerouting_process.trained(tmp_path, rerouting_process.ROWS, adapters=adapters)
    for rank in range(rerouting_process.NUM_PROCESSES):
        assert_alike(expected, load_file(tmp_path / str(rank)), tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_a_counted_step_weighs_the_same_whether_processes_divide_by_all_labels_or_their_own(
    whole: bool, tmp_path: Path
) -> None:
    spawn(rerouting_process.averaged, (str(tmp_path), whole), nprocs=rerouting_process.NUM_PROCESSES)
    model = model_of("qwen3_moe").train()
    mixtura.balance(model, "switch_loss", coefficient=1.0)
    model(**rerouting_process.batch(slice(0, rerouting_process.ROWS))).loss.backward()
    for rank in range(rerouting_process.NUM_PROCESSES):
        assert_alike(gradients(model), load_file(tmp_path / str(rank)), tolerance=1e-4)
