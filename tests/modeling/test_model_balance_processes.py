"""Balancers in training on two processes: what one process with the whole batch makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from modeling.test_model_balance import BIASED, assert_same, batches, num_labels, step, together
from modeling.tiny_models import tiny_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mixtura.methods.balancers.quantile import Quantile
from mixtura.running.parallel.meeting import leave
from mixtura.types import BalancerInput

GLOBAL = {"balancers": [{"name": "global_batch", "coefficient": 1.0}]}


def _means(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """The bias after a step of which each process sees one part."""
    model = tiny_model({"balancers": ["quantile"]}).train()
    model(**part)
    model.end_step()
    return {"bias": model.model.balance.of(0).bias}


def _globals(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss over the counts of both processes."""
    return {"global": tiny_model(GLOBAL).train()(**part).aux_loss.detach()}


def _own_labels(parts: list[dict[str, Tensor]], rank: int) -> dict[str, Tensor]:
    """The loss added where each process divides by its own labels, and gradients are averaged."""
    model = tiny_model(GLOBAL).train()
    model.count_ahead([parts[rank]])
    return {"own": model(**parts[rank], num_items_in_batch=num_labels([parts[rank]])).aux_loss.detach()}


def _wrapped(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ties after two steps of a model that waits for a gradient of every parameter."""
    model = tiny_model({"balancers": ["conflict_loss"]}).train()
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        torch.autograd.backward(wrapped(**part).loss)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.end_step()
        model.zero_grad()
    return {"ties": model.model.balance.of(0).ties.detach()}


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    parts = batches()
    model = tiny_model(BIASED).train()
    model.count_ahead([parts[rank]])
    # Gradients are averaged over processes, so each weighs its loss by their number.
    torch.autograd.backward(2 * model(**parts[rank], num_items_in_batch=num_labels(parts)).loss)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter -= 0.1 * parameter.grad / 2
    model.end_step()
    found = {"state": model.state_dict()}
    found |= _means(parts[rank]) | _globals(parts[rank]) | _own_labels(parts, rank) | _wrapped(parts[rank])
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


@pytest.mark.slow
def test_two_processes_are_the_batch(tmp_path: Path) -> None:
    mp.start_processes(_process, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole, both = tiny_model(BIASED), tiny_model(BIASED)
    both.load_state_dict(found[0]["state"])
    parts = batches()
    step(whole, [together(parts)], num_labels(parts), ahead=False)
    assert_same(whole, both)

    biases = []
    for part in parts:
        (routing, _) = tiny_model({"balancers": ["quantile"]}).train()(**part, output_routing=True).routings
        given = BalancerInput(routing=routing, state={"bias": torch.zeros(4)})
        biases.append(Quantile().update(given)["bias"])
    expected = tiny_model(GLOBAL).train()(**together(parts)).aux_loss
    sizes = torch.tensor([float(part["attention_mask"].sum()) for part in parts])
    for one in found:
        torch.testing.assert_close(one["bias"], torch.stack(biases).mean(0))
        assert torch.equal(one["ties"], found[0]["ties"])
    joined = torch.stack([one["global"] for one in found])
    torch.testing.assert_close((joined * sizes / sizes.sum()).sum(), expected)
    torch.testing.assert_close(torch.stack([one["own"] for one in found]).mean(), expected)
