"""One of several processes that train a balanced model together, for the tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rerouted import gradients, model_of, texts, with_adapters
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import mixtura
from mixtura.running.parallel.meeting import joined, leave

NUM_PROCESSES = 2
ROWS = 4


def batch(rows: slice) -> dict[str, Tensor]:
    """Some rows of the batch that is trained on."""
    ids = texts(ROWS, 8, seed=9)[rows]
    return {"input_ids": ids, "labels": ids}


def balanced(family: str) -> tuple[Any, Any]:
    """A model with a loss over the whole batch's counts, a bias of them, and a bias of its own tokens."""
    model = model_of(family).train()
    made = mixtura.balance(model, [("global_batch", {"coefficient": 1.0}), ("loss_free", {"rate": 0.01})])
    return model, made


def trained(folder: Path, rows_each: int, *, adapters: bool = False) -> dict[str, Tensor]:
    """The weights and biases after two steps of a `Trainer`, in however many processes there are."""
    model, made = balanced("qwen3_moe")
    if adapters:
        model = with_adapters(model, "router")
    rows = [{"input_ids": row, "labels": row.clone()} for row in texts(2 * ROWS, 8, seed=9)]
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=rows_each,
        max_steps=2,
        optim="sgd",
        learning_rate=0.5,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[made.callback])  # type: ignore[arg-type]
    trainer.train()
    biases = {f"bias.{index}": bias.clone() for index, bias in made.biases().items()}
    mixtura.restore(model)
    return {name: p.detach().clone() for name, p in model.named_parameters()} | biases


def run_trainer(rank: int, port: int, folder: str, adapters: bool = False) -> None:
    """One process of a `Trainer`, as ``torchrun`` starts it."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(NUM_PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    found = trained(Path(folder), ROWS // NUM_PROCESSES, adapters=adapters)
    save_file({name: value.contiguous() for name, value in found.items()}, Path(folder) / f"{rank}")
    leave()


def train(rank: int, family: str, folder: str) -> None:
    """A step in two micro-batches on this process's rows; writes gradients and biases."""
    with joined(rank, NUM_PROCESSES, folder):
        model, made = balanced(family)
        shared = DistributedDataParallel(model)
        mine = [slice(2 * rank, 2 * rank + 1), slice(2 * rank + 1, 2 * rank + 2)]
        with made.counting():
            for rows in mine:
                model(**batch(rows))
        with shared.no_sync():
            (shared(**batch(mine[0])).loss / 2).backward()
        (shared(**batch(mine[1])).loss / 2).backward()
        made.end_step()
        found = gradients(model) | {f"bias.{index}": bias for index, bias in made.biases().items()}
        save_file({name: value.contiguous() for name, value in found.items()}, Path(folder) / f"{rank}")


def _shared_out(model: Any, how: str) -> Any:
    """The model with its parameters shared out over the processes."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeTopKRouter

    if how == "fsdp1":
        policy = ModuleWrapPolicy({Qwen3MoeDecoderLayer, Qwen3MoeTopKRouter})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    for layer in model.model.layers:
        if how == "fsdp2 routers":
            fully_shard(layer.mlp.gate)
        fully_shard(layer)
    return fully_shard(model)


def sharded(rank: int, how: str, folder: str) -> None:
    """Changed models before and after they are shared out; writes losses and biases."""
    mine = batch(slice(2 * rank, 2 * rank + 2))
    found: dict[str, Tensor] = {}
    changes: dict[str, Any] = {
        "top_p": lambda model: mixtura.set_router(model, "top_p", p=0.4),
        "ada_moe": lambda model: mixtura.set_router(model, "ada_moe", num_null=4),
        "balance": lambda model: mixtura.balance(model, ["switch_loss", ("loss_free", {"rate": 0.01})]),
    }
    with joined(rank, NUM_PROCESSES, folder):
        for name, change in changes.items():
            for prefix in ("expected.", ""):
                model = model_of("qwen3_moe").train()
                made = change(model)
                shared = _shared_out(model, how) if not prefix else model
                loss = shared(**mine, use_cache=False).loss
                loss.backward()
                made.end_step()
                found[f"{prefix}{name}"] = loss.detach()
                biases = made.biases() if name == "balance" else {}
                found |= {f"{prefix}bias.{index}": bias.clone() for index, bias in biases.items()}
        save_file({name: value.contiguous() for name, value in found.items()}, Path(folder) / f"{rank}")


def averaged(rank: int, folder: str, whole: bool) -> None:
    """A step of two parts after counting; processes divide by all labels, or each by its own."""
    with joined(rank, NUM_PROCESSES, folder):
        model = model_of("qwen3_moe").train()
        made = mixtura.balance(model, "switch_loss", coefficient=1.0)
        shared = DistributedDataParallel(model)
        parts = [batch(slice(2 * rank, 2 * rank + 1)), batch(slice(2 * rank + 1, 2 * rank + 2))]
        with made.counting():
            for part in parts:
                model(**part)
        own = sum(int(part["labels"][:, 1:].ne(-100).sum()) for part in parts)
        total = torch.tensor(own)
        if whole:
            dist.all_reduce(total)
        scale = NUM_PROCESSES if whole else 1
        with shared.no_sync():
            (scale * shared(**parts[0], num_items_in_batch=total).loss).backward()
        (scale * shared(**parts[1], num_items_in_batch=total).loss).backward()
        save_file(
            {name: slope.contiguous() for name, slope in gradients(model).items()}, Path(folder) / f"{rank}"
        )
