"""Balancers in training: one update a step, whatever the step is cut into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from modeling.tiny_models import some_ids, tiny_model
from torch import Tensor

from mixtura.modeling.family import MixturaForCausalLM

BIASED = {"balancers": ["loss_free", {"name": "switch_loss", "coefficient": 1.0}]}


def padded(rows: Tensor) -> dict[str, Tensor]:
    """A batch whose later rows end earlier, in padding."""
    mask = torch.ones_like(rows)
    mask[-1, 6:] = 0
    return {"input_ids": rows, "attention_mask": mask, "labels": rows.masked_fill(mask == 0, -100)}


def batches() -> list[dict[str, Tensor]]:
    """Two micro-batches of different numbers of tokens."""
    return [padded(some_ids(2, 10, seed=1)), padded(some_ids(2, 10, seed=2))]


def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The micro-batches as one batch."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def num_labels(parts: list[dict[str, Tensor]]) -> int:
    """Labels that count, after the shift."""
    return sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)


def step(model: MixturaForCausalLM, parts: list[dict[str, Tensor]], total: int, *, ahead: bool) -> None:
    """One optimizer step over micro-batches."""
    model.train()
    if ahead:
        model.count_ahead(parts)
    for part in parts:
        torch.autograd.backward(model(**part, num_items_in_batch=total).loss)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    model.end_step()
    model.zero_grad()


def assert_same(one: MixturaForCausalLM, two: MixturaForCausalLM) -> None:
    """Weights and balancer states agree within rounding."""
    for (name, first), second in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(first, second, msg=lambda text, name=name: f"{name}: {text}")


def test_micro_batches_are_the_batch() -> None:
    whole, cut = tiny_model(BIASED), tiny_model(BIASED)
    parts = batches()
    step(whole, [together(parts)], num_labels(parts), ahead=False)
    step(cut, parts, num_labels(parts), ahead=True)
    assert_same(whole, cut)


def test_counting_ahead_draws_the_same_noise() -> None:
    model = tiny_model({"router": "noisy_top_k", "balancers": ["switch_loss"]}).train()
    parts = batches()
    model.count_ahead(parts)
    counted = model.model.balance.whole
    assert counted is not None
    routed = [model(**part, output_routing=True).routings for part in parts]
    for layer, load in enumerate(counted.loads):
        assert torch.equal(load, sum(one[layer].load for one in routed).double())


def test_the_bias_moves_once_a_step_by_the_load_of_all_parts() -> None:
    model = tiny_model({"balancers": [{"name": "loss_free", "rate": 0.5}]}).train()
    loads = torch.zeros(4)
    parts = batches()
    for part in parts:
        output = model(**part, output_routing=True)
        loads += output.routings[0].load
    assert model.model.balance.of(0).bias.tolist() == [0.0] * 4
    model.end_step()
    assert torch.equal(model.model.balance.of(0).bias, 0.5 * (loads.mean() - loads).sign())


def test_evaluation_leaves_balancers_alone() -> None:
    model = tiny_model(BIASED)
    ids = some_ids()
    assert model(ids, labels=ids).aux_loss is None
    model.train()
    with torch.no_grad():
        model(ids, labels=ids)
    model.end_step()
    assert not model.model.balance.of(0).bias.any()


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
    if rank == 0:
        torch.save(model.state_dict(), f"{folder}/state.pt")
    # Gloo's thread has then let go of its tensors; freeing the group while it does so can wait for ever.
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_the_batch(tmp_path: Path) -> None:
    mp.start_processes(_process, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    whole, both = tiny_model(BIASED), tiny_model(BIASED)
    both.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    parts = batches()
    step(whole, [together(parts)], num_labels(parts), ahead=False)
    assert_same(whole, both)


def test_two_passes_are_compared() -> None:
    model = tiny_model({"router": {"name": "thor"}}).train()
    ids = some_ids()
    assert model(ids, labels=ids).aux_loss > 0
    assert model.eval()(ids, labels=ids).aux_loss is None
