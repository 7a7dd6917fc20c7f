"""One of several processes with a model whose experts lie on all of them, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import tiny_model
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

import mixtura
import mixtura.modeling.family
from mixtura.methods import create
from mixtura.running.parallel.meeting import joined
from mixtura.types.placement import LayerPlacement, Placement


@dataclass(frozen=True)
class Case:
    """What is laid where, and what is sent how."""

    model: str = "qwen3_moe"
    placement: str = "contiguous"
    settings: dict[str, Any] = field(default_factory=dict)
    exchange: str = "flat"
    nodes: int = 1
    checkpointing: bool = False
    dtype: torch.dtype = torch.float64


def model_of(case: Case) -> Any:
    """A tiny model, the same in all processes."""
    if case.model == "own":
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "mixtura",
            vocab_size=48,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            moe={"router": {"name": "top_k", "top_k": 2}, "num_experts": 6, "d_expert": 8},
        )
        made = AutoModelForCausalLM.from_config(config)
    else:
        made = tiny_model(case.model, seed=0)
    made = made.to(case.dtype).train()
    if case.checkpointing:
        made.gradient_checkpointing_enable({"use_reentrant": False})
    return made


def batch_of(rank: int) -> Tensor:
    """A process's own tokens: of different lengths and numbers."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(3, 40, (1 + rank % 2, 5 + 3 * rank), generator=generator)


def loss_of(model: Any, rank: int) -> tuple[Tensor, Tensor]:
    """A process's loss and logits."""
    ids = batch_of(rank)
    made = model(input_ids=ids, labels=ids, use_cache=False)
    return made.loss, made.logits


def placement_of(case: Case, size: int) -> Any:
    """A placement by name, or one of those made here."""
    made = {"copies": _copies, "all on one": _all_on_one}.get(case.placement)
    if made is None:
        return create("placements", case.placement, **case.settings)
    per_node = size // case.nodes
    layers = tuple(LayerPlacement(index=index, **made(case, size)) for index in range(4))
    return Placement(source_digest="", num_devices=size, devices_per_node=per_node, layers=layers)


def num_experts_of(case: Case) -> int:
    from mixtura.running.parallel.entry import sizes_of
    from mixtura.running.parallel.holding import experts_of

    return sizes_of(next(iter(experts_of(model_of(case)).values())))[2]


def _copies(case: Case, size: int) -> dict[str, Any]:
    """Experts dealt in an odd order; the first two lie on several devices, in uneven shares."""
    devices: list[tuple[int, ...]] = [((5 * e + 1) % size,) for e in range(num_experts_of(case))]
    devices[0] = (size - 1, 0)
    devices[1] = tuple(range(size))
    shares: list[tuple[float, ...]] = [(1.0,) * len(held) for held in devices]
    shares[0] = (0.25, 0.75)
    shares[1] = (1 / size,) * size
    return {"devices": tuple(devices), "shares": tuple(shares)}


def _all_on_one(case: Case, size: int) -> dict[str, Any]:
    """The last device has all experts, the others none."""
    return {"devices": ((size - 1,),) * num_experts_of(case)}


def parallel_of(case: Case, size: int) -> Any:
    """The model of a case, its experts laid out."""
    mesh = None
    if case.nodes > 1:
        mesh = init_device_mesh("cpu", (case.nodes, size // case.nodes), mesh_dim_names=("node", "device"))
    return mixtura.parallelize(model_of(case), mesh, placement_of(case, size), exchange=case.exchange)


def run(rank: int, size: int, folder: str, cases: dict[str, Case]) -> None:
    """Logits, all gradients and what was sent, of each case; by process 0, but for the logits."""
    with joined(rank, size, folder):
        for name, case in cases.items():
            found = step(case, rank, size)
            save_file(found, Path(folder) / f"{name}.{rank}")


def step(case: Case, rank: int, size: int) -> dict[str, Tensor]:
    """A forward and a backward pass; two where copies follow from the first."""
    parallel = parallel_of(case, size)
    model = parallel.model
    for _ in range(2 if case.placement == "hecate" else 1):
        model.zero_grad()
        loss, logits = loss_of(model, rank)
        loss.backward()
        loads = torch.stack([layer.loads.clone() for layer in parallel.layers.values()])
        parallel.end_step()
    parallel.reduce_gradients()
    found = {"loads": loads, "logits": logits.detach().contiguous()}
    experts = parallel.expert_names()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        whole = parallel.gathered(name, grad) if name in experts else grad
        if whole is not None:
            found[f"grad {name}"] = whole.clone()
    norm = parallel.clip_gradients(0.5)
    found["norm"] = norm.reshape(1)
    found["sent"] = torch.tensor([parallel.wire.sent[key] for key in ("within", "between", "messages")])
    return found


def alone(case: Case, size: int) -> dict[str, Tensor]:
    """The same by one process: the mean of the processes' losses."""
    model = model_of(case)
    found = {}
    total: Any = 0
    for rank in range(size):
        loss, logits = loss_of(model, rank)
        found[f"logits {rank}"] = logits.detach()
        total = total + loss / size
    total.backward()
    found |= {
        f"grad {n}": p.grad if p.grad is not None else torch.zeros_like(p)
        for n, p in model.named_parameters()
    }
    return found


Work = Callable[..., Any]
