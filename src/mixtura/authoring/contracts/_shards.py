"""Run a balancer on shards of a batch in two processes that talk through gloo."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtura.authoring.contracts._core import Subject, subject
from mixtura.authoring.contracts._inputs import SHAPE
from mixtura.authoring.contracts._processes import run_apart
from mixtura.running.parallel.meeting import joined
from mixtura.types import BalancerInput, Routing

_NUM_PROCESSES = 2
_PARTS = ("token_ids", "expert_ids", "weights", "scores", "logits", "valid")
_LOSS = "the loss"


def loss_of_shards(method: Subject, whole: Routing) -> list[tuple[float, dict[str, Tensor]]]:
    """The loss of the whole batch and the next state, as each of two processes finds them."""
    with TemporaryDirectory() as folder:
        path = Path(folder)
        save_file({name: getattr(whole, name).detach().contiguous() for name in _PARTS}, path / "whole")
        run_apart(_work, _NUM_PROCESSES, method.header.kind, str(method.header.path), folder)
        found = [load_file(path / str(rank)) for rank in range(_NUM_PROCESSES)]
        return [(float(state.pop(_LOSS)), state) for state in found]


def _work(rank: int, kind: str, name: str, folder: str) -> None:
    """One process: its shard of the tokens, the counts of both."""
    path = Path(folder)
    with joined(rank, _NUM_PROCESSES, folder):
        made = _shard_result(rank, subject(kind, name), load_file(path / "whole"))
        save_file({key: value.contiguous() for key, value in made.items()}, path / str(rank))


def _shard_result(rank: int, method: Subject, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    tokens = torch.arange(whole["valid"].shape[0])
    if method.has("whole_sequences"):
        tokens = tokens * _NUM_PROCESSES // max(len(tokens), 1)
    mine = (tokens % _NUM_PROCESSES) == rank
    routing = Routing.from_assignments(
        whole["token_ids"],
        whole["expert_ids"],
        whole["weights"],
        scores=whole["scores"],
        logits=whole["logits"],
        valid=whole["valid"] & mine,
    )
    load, counted = routing.load, routing.valid.sum()
    dist.all_reduce(load)
    dist.all_reduce(counted)
    facts: dict[str, Any] = {"load": load, "loads": load[None], "num_tokens": int(counted)}
    balancer = method.create()
    contract = method.contract
    inputs: BalancerInput = contract.given_for(method, routing, 0, state=balancer.start(SHAPE), **facts)
    loss = balancer.loss(inputs).detach() * routing.valid.sum() / counted
    dist.all_reduce(loss)
    return {_LOSS: loss, **balancer.update(inputs)}
